"""Does the pinned llama.cpp answer through ctypes, and keep to itself?"""

import ctypes

from gemma_qat.evaluation import llama_binding


def test_the_structs_fit_the_library():
  params = llama_binding.library().context_default_params()
  # The first, a middle and the last fields that are not zero.
  assert (params.n_ctx, params.flash_attn_type, params.swa_full) == (
      512, -1, True,
  )
  # 64 bits of pointers and sizes at the end, aligned: a field too many or too
  # few shows here. Counted by hand from include/llama.h.
  assert ctypes.sizeof(llama_binding.ContextParams) == 168
  assert ctypes.sizeof(llama_binding.ModelParams) == 80
  assert ctypes.sizeof(llama_binding.Batch) == 56


def test_the_library_is_loaded_once():
  assert llama_binding.library() is llama_binding.library()


def test_errors_are_kept_until_they_are_read(tmp_path, capfd):
  library = llama_binding.library()
  library.forget()
  missing = str(tmp_path / 'missing.gguf').encode()
  assert not library.model_load_from_file(
      missing, library.model_default_params()
  )
  assert 'missing.gguf' in library.last_words()
  assert library.last_words() == 'no reason given'
  assert capfd.readouterr() == ('', '')
