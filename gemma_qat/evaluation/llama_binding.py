"""How is llama.cpp called, without a compiler?

The wheel `xllamacpp` holds the whole of llama.cpp in one shared object that
exports its C API; ctypes calls it. Structs cross that border by value, so their
layout is bound to one version of the wheel: the version is pinned, and the
defaults that the library fills in are compared with the known ones before
anything else is called. Source of the declarations: include/llama.h of the
source package of the same version.
"""

import collections
import ctypes
import functools
from importlib import metadata
from importlib import util
import pathlib

from gemma_qat import errors

VERSION = '2026.10.11549'

_INT32_P = ctypes.POINTER(ctypes.c_int32)
_LOG_CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p
)
# ggml_log_level: a real error, and a line that continues the one before.
_LEVEL_ERROR, _LEVEL_CONTINUED = 4, 5


class Batch(ctypes.Structure):
  """llama_batch: tokens with their places, and whose logits are wanted."""

  _fields_ = [
      ('n_tokens', ctypes.c_int32),
      ('token', _INT32_P),
      ('embd', ctypes.POINTER(ctypes.c_float)),
      ('pos', _INT32_P),
      ('n_seq_id', _INT32_P),
      ('seq_id', ctypes.POINTER(_INT32_P)),
      ('logits', ctypes.POINTER(ctypes.c_int8)),
  ]


class ModelParams(ctypes.Structure):
  """llama_model_params."""

  _fields_ = [
      ('devices', ctypes.c_void_p),
      ('tensor_buft_overrides', ctypes.c_void_p),
      ('n_gpu_layers', ctypes.c_int32),
      ('split_mode', ctypes.c_int),
      ('load_mode', ctypes.c_int),
      ('lazy_mode', ctypes.c_int),
      ('main_gpu', ctypes.c_int32),
      ('tensor_split', ctypes.c_void_p),
      ('progress_callback', ctypes.c_void_p),
      ('progress_callback_user_data', ctypes.c_void_p),
      ('kv_overrides', ctypes.c_void_p),
      ('vocab_only', ctypes.c_bool),
      ('check_tensors', ctypes.c_bool),
      ('use_extra_bufts', ctypes.c_bool),
      ('no_host', ctypes.c_bool),
      ('no_alloc', ctypes.c_bool),
      ('load_mtp', ctypes.c_bool),
  ]


class ContextParams(ctypes.Structure):
  """llama_context_params."""

  _fields_ = [
      ('n_ctx', ctypes.c_uint32),
      ('n_batch', ctypes.c_uint32),
      ('n_ubatch', ctypes.c_uint32),
      ('n_seq_max', ctypes.c_uint32),
      ('n_rs_seq', ctypes.c_uint32),
      ('n_outputs_max', ctypes.c_uint32),
      ('n_outputs_max_per_seq', ctypes.c_uint32),
      ('n_threads', ctypes.c_int32),
      ('n_threads_batch', ctypes.c_int32),
      ('ctx_type', ctypes.c_int),
      ('rope_scaling_type', ctypes.c_int),
      ('pooling_type', ctypes.c_int),
      ('attention_type', ctypes.c_int),
      ('flash_attn_type', ctypes.c_int),
      ('rope_freq_base', ctypes.c_float),
      ('rope_freq_scale', ctypes.c_float),
      ('yarn_ext_factor', ctypes.c_float),
      ('yarn_attn_factor', ctypes.c_float),
      ('yarn_beta_fast', ctypes.c_float),
      ('yarn_beta_slow', ctypes.c_float),
      ('yarn_orig_ctx', ctypes.c_uint32),
      ('defrag_thold', ctypes.c_float),
      ('cb_eval', ctypes.c_void_p),
      ('cb_eval_user_data', ctypes.c_void_p),
      ('type_k', ctypes.c_int),
      ('type_v', ctypes.c_int),
      ('moe_cache_size', ctypes.c_size_t),
      ('abort_callback', ctypes.c_void_p),
      ('abort_callback_data', ctypes.c_void_p),
      ('embeddings', ctypes.c_bool),
      ('offload_kqv', ctypes.c_bool),
      ('no_perf', ctypes.c_bool),
      ('op_offload', ctypes.c_bool),
      ('swa_full', ctypes.c_bool),
      ('kv_unified', ctypes.c_bool),
      ('samplers', ctypes.c_void_p),
      ('n_samplers', ctypes.c_size_t),
      ('ctx_other', ctypes.c_void_p),
  ]


# What the library of this version puts into the fields that are not zero. A
# field that moved would carry its neighbour's value.
_MODEL_DEFAULTS = {
    'n_gpu_layers': -1,
    'split_mode': 1,
    'load_mode': -1,
    'lazy_mode': 1,
    'use_extra_bufts': True,
}
_CONTEXT_DEFAULTS = {
    'n_ctx': 512,
    'n_batch': 2048,
    'n_ubatch': 512,
    'n_seq_max': 1,
    'n_outputs_max_per_seq': 1,
    'n_threads': 4,
    'n_threads_batch': 4,
    'rope_scaling_type': -1,
    'pooling_type': -1,
    'attention_type': -1,
    'flash_attn_type': -1,
    'yarn_ext_factor': -1.0,
    'yarn_attn_factor': -1.0,
    'yarn_beta_fast': -1.0,
    'yarn_beta_slow': -1.0,
    'defrag_thold': -1.0,
    'type_k': 1,
    'type_v': 1,
    'offload_kqv': True,
    'no_perf': True,
    'op_offload': True,
    'swa_full': True,
}

_POINTER, _INT, _BOOL = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
_TEXT = ctypes.c_char_p
# Function name without `llama_` -> (result, arguments).
_SIGNATURES = {
    'backend_init': (None, ()),
    'log_set': (None, (_LOG_CALLBACK, _POINTER)),
    'model_default_params': (ModelParams, ()),
    'context_default_params': (ContextParams, ()),
    'model_load_from_file': (_POINTER, (_TEXT, ModelParams)),
    'model_free': (None, (_POINTER,)),
    'init_from_model': (_POINTER, (_POINTER, ContextParams)),
    'free': (None, (_POINTER,)),
    'n_batch': (ctypes.c_uint32, (_POINTER,)),
    'n_ubatch': (ctypes.c_uint32, (_POINTER,)),
    'n_threads': (_INT, (_POINTER,)),
    'n_threads_batch': (_INT, (_POINTER,)),
    'get_memory': (_POINTER, (_POINTER,)),
    'memory_clear': (None, (_POINTER, _BOOL)),
    'decode': (_INT, (_POINTER, Batch)),
    'get_logits': (ctypes.POINTER(ctypes.c_float), (_POINTER,)),
    'model_get_vocab': (_POINTER, (_POINTER,)),
    'vocab_n_tokens': (_INT, (_POINTER,)),
    'vocab_bos': (_INT, (_POINTER,)),
    'vocab_is_eog': (_BOOL, (_POINTER, _INT)),
    'tokenize': (
        _INT, (_POINTER, _TEXT, _INT, _INT32_P, _INT, _BOOL, _BOOL)
    ),
    'token_to_piece': (_INT, (_POINTER, _INT, _TEXT, _INT, _INT, _BOOL)),
}


class Library:
  """The functions of llama.cpp (as `library.decode`, ...) and its last words.

  llama.cpp prints to stderr unless it is given a callback: here it is silent,
  and warnings and errors are kept for `last_words`.
  """

  def __init__(self, path: pathlib.Path):
    shared = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
      function = getattr(shared, f'llama_{name}')
      function.restype, function.argtypes = result, arguments
      setattr(self, name, function)
    self._lines = collections.deque(maxlen=20)
    self._keep = False
    # The library holds only the address: without this attribute the callback
    # would be collected and the next log line would crash the process.
    self._callback = _LOG_CALLBACK(self._log)
    self.log_set(self._callback, None)
    self.backend_init()

  def last_words(self) -> str:
    """Returns the latest errors in one line, and forgets them."""
    words = ' '.join(' '.join(self._lines).split())
    self._lines.clear()
    return words or 'no reason given'

  def forget(self) -> None:
    """Drops what was logged so far: it belongs to an earlier call."""
    self._lines.clear()

  def _log(self, level, text, _):
    if level != _LEVEL_CONTINUED:
      self._keep = level == _LEVEL_ERROR
    if self._keep and text:
      self._lines.append(text.decode('utf-8', 'replace'))


@functools.cache
def library() -> Library:
  """Loads llama.cpp, once a process, and checks that the structs fit.

  Raises:
    UserError: the wheel is missing, has another version, or fills its structs
      with other defaults than the ones known here.
  """
  advice = f'install it with `pip install xllamacpp=={VERSION}`.'
  try:
    installed = metadata.version('xllamacpp')
  except metadata.PackageNotFoundError:
    raise errors.UserError(f'llama.cpp is missing: {advice}') from None
  if installed != VERSION:
    raise errors.UserError(
        f'xllamacpp {installed} has other structs than {VERSION}: {advice}'
    )
  # Found, not imported: the import starts a server module we do not need.
  package = pathlib.Path(util.find_spec('xllamacpp').origin).parent
  loaded = Library(next(package.glob('xllamacpp*.so')))
  _check('llama_model_params', loaded.model_default_params(), _MODEL_DEFAULTS)
  _check(
      'llama_context_params', loaded.context_default_params(), _CONTEXT_DEFAULTS
  )
  return loaded


def _check(name, params, expected):
  for field, _ in params._fields_:
    found = getattr(params, field) or 0
    if found != expected.get(field, 0):
      raise errors.UserError(
          f'xllamacpp {VERSION}: field {field} of {name} is {found} instead of '
          f'{expected.get(field, 0)}, so this build has another struct layout: '
          'reinstall the wheel from PyPI.'
      )
