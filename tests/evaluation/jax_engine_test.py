"""Does the engine in JAX score as the protocol in NumPy does?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.evaluation import jax_engine
from gemma_qat.evaluation import protocol

V, D = 300, 16
# 99 scored positions a chunk: one full piece of 64 and a rest to be filled up.
CHUNKS = protocol.chunk_tokens(
    np.random.default_rng(0).integers(3, V, 600), context=200, bos_id=2
)


def _model(seed, dtype=jnp.float32, noise=0.0):
  """Hidden states that depend on the token and on its place."""
  keys = jax.random.split(jax.random.key(seed), 4)
  table = jax.random.normal(keys[0], (V, D))
  places = jax.random.normal(keys[1], (CHUNKS.shape[1], D))
  head = jax.random.normal(keys[2], (V, D))
  head += noise * jax.random.normal(keys[3], (V, D))

  @jax.jit
  def hidden_fn(tokens):
    return (table[tokens] + places[None]).astype(dtype)

  return hidden_fn, head.astype(dtype)


def _by_hand(models, against):
  """The same in NumPy and float64, one position after the other."""
  results = {name: [] for name in models}
  for chunk in CHUNKS:
    log_probs = {}
    for name, (hidden_fn, head) in models.items():
      hidden = np.asarray(hidden_fn(chunk[None])[0], np.float64)
      logits = hidden @ np.asarray(head, np.float64).T
      log_probs[name] = logits - np.log(
          np.exp(logits).sum(axis=-1, keepdims=True)
      )
    base = log_probs[against]
    for name, rows in log_probs.items():
      for p in range(100, 199):
        kl = (np.exp(base[p]) * (base[p] - rows[p])).sum()
        same = rows[p].argmax() == base[p].argmax()
        results[name].append((-rows[p, chunk[p + 1]], kl, same))
  return {
      name: protocol.summarize(
          protocol.TokenScores(*map(np.array, zip(*scores))), len(CHUNKS)
      )
      for name, scores in results.items()
  }


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_numbers_are_those_of_float64_on_paper(dtype):
  models = {
      'student': _model(0, dtype, noise=0.1),
      'teacher': _model(0, dtype),
      'stranger': _model(1, dtype),
  }
  results = jax_engine.evaluate(models, CHUNKS, against='teacher')
  expected = _by_hand(models, 'teacher')
  assert list(results) == list(models)
  for name in ('student', 'stranger'):
    assert results[name].as_dict() == pytest.approx(
        expected[name].as_dict(), rel=1e-4
    )
  assert results['teacher'].ppl == pytest.approx(expected['teacher'].ppl)
  assert results['teacher'].kld is None
  assert results['student'].kld < results['stranger'].kld


def test_a_model_does_not_diverge_from_itself():
  models = {'base': _model(0), 'same': _model(0)}
  same = jax_engine.evaluate(models, CHUNKS, against='base')['same']
  assert (same.kld, same.top1) == (0.0, 1.0)


def test_without_a_base_the_perplexities_stay():
  models = {'student': _model(0, noise=0.1), 'teacher': _model(0)}
  alone = jax_engine.evaluate(models, CHUNKS)
  beside = jax_engine.evaluate(models, CHUNKS, against='teacher')
  assert alone['student'].kld is None
  for name in models:
    assert alone[name].ppl == pytest.approx(beside[name].ppl, rel=1e-6)


def test_progress_ends_with_the_result():
  told = []
  results = jax_engine.evaluate(
      {'m': _model(0)}, CHUNKS, on_chunk=lambda *args: told.append(args)
  )
  assert [args[:2] for args in told] == [(1, 3), (2, 3), (3, 3)]
  assert told[-1][2] == results


def test_an_unknown_base_is_refused():
  with pytest.raises(errors.UserError, match='teacher'):
    jax_engine.evaluate({'m': _model(0)}, CHUNKS, against='teacher')
