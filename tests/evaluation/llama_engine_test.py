"""Are several files in one process measured as each would be alone?"""

import gguf
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.evaluation import llama_cpp
from gemma_qat.evaluation import llama_engine
from gemma_qat.evaluation import protocol
from tests.evaluation import tiny_gguf

CONTEXT = 64
TOKENS = np.random.default_rng(0).integers(4, tiny_gguf.V, 4 * CONTEXT + 10)


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
  """One set of weights in four formats."""
  folder = tmp_path_factory.mktemp('formats')
  paths = {}
  for name in ('F32', 'F16', 'Q8_0', 'Q4_0'):
    paths[name] = folder / f'{name}.gguf'
    kind = gguf.GGMLQuantizationType[name]
    tiny_gguf.write(paths[name], matrix_type=kind)
  return paths


@pytest.fixture(scope='module')
def together(paths):
  return llama_engine.evaluate(paths, TOKENS, CONTEXT, against='F32')


def test_the_coarser_the_format_the_farther_from_the_base(together):
  assert list(together) == ['F32', 'F16', 'Q8_0', 'Q4_0']
  assert 0 < together['F16'].kld < together['Q8_0'].kld < together['Q4_0'].kld
  assert together['F16'].kld < 1e-4
  assert together['Q4_0'].top1 < together['Q8_0'].top1 <= together['F16'].top1


def test_the_base_has_only_a_perplexity(together):
  assert together['F32'].kld is None
  assert together['F32'].tokens == 4 * 31


@pytest.mark.parametrize('name', ['F32', 'Q4_0'])
def test_company_does_not_change_the_numbers(paths, together, name):
  alone = llama_engine.evaluate({name: paths[name]}, TOKENS, CONTEXT)
  assert alone[name].ppl == together[name].ppl


def test_the_order_of_the_files_does_not_change_the_numbers(paths, together):
  turned = {name: paths[name] for name in reversed(paths)}
  results = llama_engine.evaluate(turned, TOKENS, CONTEXT, against='F32')
  assert results == together


def test_a_file_does_not_diverge_from_itself(paths):
  twice = {'base': paths['Q4_0'], 'same': paths['Q4_0']}
  same = llama_engine.evaluate(twice, TOKENS, CONTEXT, against='base')['same']
  assert (same.kld, same.kld_q99, same.top1) == (0.0, 0.0, 1.0)


def test_the_result_is_the_protocol_applied_to_the_logits(paths, together):
  chunks = protocol.chunk_tokens(TOKENS, CONTEXT, tiny_gguf.BOS)
  nll = []
  with llama_cpp.LlamaCpp(paths['Q8_0'], CONTEXT) as model:
    for chunk in chunks:
      logits = model.logits(chunk).astype(np.float64)
      for position in range(CONTEXT // 2, CONTEXT - 1):
        row = logits[position]
        total = np.log(np.exp(row).sum())
        nll.append(total - row[chunk[position + 1]])
  assert together['Q8_0'].ppl == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)


def test_progress_ends_with_the_result(paths):
  told = []
  pair = {name: paths[name] for name in ('F32', 'Q8_0')}
  results = llama_engine.evaluate(
      pair, TOKENS, CONTEXT, 2, 'F32', lambda *args: told.append(args)
  )
  assert [args[:2] for args in told] == [(1, 2), (2, 2)]
  assert told[-1][2] == results
  assert results['F32'].chunks == 2


def test_files_with_other_vocabularies_are_refused(paths, tmp_path):
  tensors = tiny_gguf.random_tensors()
  tensors['token_embd.weight'] = tensors['token_embd.weight'][:448]
  tiny_gguf.write(tmp_path / 'short.gguf', tensors)
  pair = {'long': paths['F32'], 'short': tmp_path / 'short.gguf'}
  with pytest.raises(errors.UserError, match='long 512, short 448'):
    llama_engine.evaluate(pair, TOKENS, CONTEXT)
