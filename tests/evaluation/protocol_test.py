"""Are the right tokens scored, and do the scores add up as in llama.cpp?"""

import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.evaluation import protocol


def _logits(rows, vocab, seed=0, scale=3.0):
  rng = np.random.default_rng(seed)
  return rng.normal(0, scale, (rows, vocab)).astype(np.float32)


def _float64_log_softmax(logits):
  logits = logits.astype(np.float64)
  logits -= logits.max(axis=-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_every_chunk_begins_with_bos_and_the_rest_is_dropped():
  chunks = protocol.chunk_tokens(np.arange(100, 119), 8, bos_id=2)
  np.testing.assert_array_equal(
      chunks,
      [
          [2, 101, 102, 103, 104, 105, 106, 107],
          [2, 109, 110, 111, 112, 113, 114, 115],
      ],
  )
  assert chunks.dtype == np.int32


def test_chunking_leaves_the_text_alone():
  tokens = np.arange(16, dtype=np.int32)
  protocol.chunk_tokens(tokens, 8, bos_id=99)
  np.testing.assert_array_equal(tokens, np.arange(16))


def test_max_chunks_takes_the_first_ones():
  tokens = np.arange(64)
  some = protocol.chunk_tokens(tokens, 8, 2, max_chunks=3)
  np.testing.assert_array_equal(some, protocol.chunk_tokens(tokens, 8, 2)[:3])
  assert len(protocol.chunk_tokens(tokens, 8, 2, max_chunks=99)) == 8


def test_a_short_text_is_refused_with_the_number_it_needs():
  with pytest.raises(errors.UserError, match='511 tokens, a chunk needs 512'):
    protocol.chunk_tokens(np.zeros(511), 512, 2)


@pytest.mark.parametrize('context, max_chunks', [(3, None), (8, 0)])
def test_settings_that_score_nothing_are_refused(context, max_chunks):
  with pytest.raises(errors.UserError):
    protocol.chunk_tokens(np.zeros(64), context, 2, max_chunks)


@pytest.mark.parametrize('context', [4, 8, 9, 512])
def test_the_second_half_is_scored_up_to_the_last_known_token(context):
  positions = protocol.scored_positions(context)
  assert positions[0] == context // 2
  assert positions[-1] == context - 2
  assert len(positions) == context - 1 - context // 2


def test_known_distributions_give_the_numbers_on_paper():
  # The model says 1/2, 1/4, 1/4; the base 1/4, 1/4, 1/2.
  logits = np.log(np.array([[0.5, 0.25, 0.25]] * 2, np.float32)) + 7
  base = np.log(np.array([[0.25, 0.25, 0.5]] * 2, np.float32))
  scores = protocol.token_scores(logits, np.array([0, 2]), base)
  np.testing.assert_allclose(scores.nll_nats, np.log([2, 4]), rtol=1e-6)
  # 1/4 log(1/2) + 1/4 log 1 + 1/2 log 2 = log(2) / 4.
  np.testing.assert_allclose(scores.kl_nats, np.log(2) / 4, rtol=1e-6)
  assert not scores.same_top.any()


def test_the_divergence_is_not_symmetric_and_takes_the_base_first():
  wide, narrow = np.zeros((1, 4), np.float32), np.float32([[9, 0, 0, 0]])
  target = np.array([0])
  to_narrow = protocol.token_scores(narrow, target, protocol.log_softmax(wide))
  to_wide = protocol.token_scores(wide, target, protocol.log_softmax(narrow))
  # A base that finds everything possible is far from a model that does not.
  assert to_narrow.kl_nats[0] > 4 > np.log(4) > to_wide.kl_nats[0]


def test_a_model_does_not_diverge_from_itself():
  logits = _logits(20, 1000)
  base = protocol.log_softmax(logits)
  scores = protocol.token_scores(logits, np.arange(20), base)
  assert (scores.kl_nats == 0).all()
  assert scores.same_top.all()


def test_a_large_vocabulary_loses_no_precision():
  logits = _logits(9, 200_000, seed=1) + np.float32(50)
  other = logits + 0.02 * _logits(9, 200_000, seed=2)
  targets = np.arange(9)
  scores = protocol.token_scores(other, targets, protocol.log_softmax(logits))
  exact, exact_base = _float64_log_softmax(other), _float64_log_softmax(logits)
  kl = (np.exp(exact_base) * (exact_base - exact)).sum(axis=-1)
  assert kl.max() < 0.01
  np.testing.assert_allclose(
      scores.nll_nats, -exact[targets, targets], atol=1e-5
  )
  np.testing.assert_allclose(scores.kl_nats, kl, atol=1e-6)


def test_rows_are_scored_independently():
  logits, base = _logits(21, 50, 1), protocol.log_softmax(_logits(21, 50, 2))
  targets = np.random.default_rng(3).integers(0, 50, 21)
  together = protocol.token_scores(logits, targets, base)
  apart = protocol.concatenate([
      protocol.token_scores(logits[[i]], targets[[i]], base[[i]])
      for i in range(21)
  ])
  np.testing.assert_array_equal(together.nll_nats, apart.nll_nats)
  np.testing.assert_array_equal(together.kl_nats, apart.kl_nats)
  np.testing.assert_array_equal(together.same_top, apart.same_top)


def test_log_softmax_can_work_in_place():
  logits = _logits(20, 30)
  expected = protocol.log_softmax(logits)
  assert protocol.log_softmax(logits, out=logits) is logits
  np.testing.assert_array_equal(logits, expected)
  np.testing.assert_allclose(np.exp(expected).sum(axis=-1), 1, rtol=1e-5)


def test_the_summary_is_the_one_on_paper():
  scores = protocol.TokenScores(
      nll_nats=np.array([1.0, 2.0, 3.0]),
      kl_nats=np.array([0.0, 0.1, 0.5]),
      same_top=np.array([True, True, False]),
  )
  fidelity = protocol.summarize(scores, chunks=3)
  assert fidelity.ppl == pytest.approx(np.exp(2))
  # Biased variance 2/3, over n - 1 = 2.
  assert fidelity.ppl_stderr == pytest.approx(np.exp(2) * np.sqrt(1 / 3))
  assert fidelity.kld == pytest.approx(0.2)
  # Mean of squares 0.26 / 3 minus 0.04, over 2.
  assert fidelity.kld_stderr == pytest.approx(np.sqrt((0.26 / 3 - 0.04) / 2))
  # Position 0.99 * 2 = 1.98 between the second and the third.
  assert fidelity.kld_q99 == pytest.approx(0.1 + 0.98 * 0.4)
  assert fidelity.top1 == pytest.approx(2 / 3)
  assert (fidelity.tokens, fidelity.chunks) == (3, 3)


def test_without_a_base_there_is_only_a_perplexity():
  scores = protocol.token_scores(_logits(5, 10), np.arange(5))
  fields = protocol.summarize(scores, chunks=1).as_dict()
  absent = {name for name, value in fields.items() if value is None}
  assert absent == {'kld', 'kld_stderr', 'kld_q99', 'top1'}


def test_chunks_add_up_and_progress_is_told():
  chunks = protocol.chunk_tokens(np.arange(64), 16, bos_id=0)
  scored = {}

  def score_chunk(chunk):
    logits = _logits(7, 64, seed=int(chunk[1]))
    scored[len(scored)] = protocol.token_scores(logits, chunk[9:])
    return {'model': scored[len(scored) - 1]}

  told = []
  results = protocol.accumulate(chunks, score_chunk, lambda *a: told.append(a))
  whole = protocol.concatenate([scored[i] for i in range(4)])
  assert results == {'model': protocol.summarize(whole, 4)}
  assert [(done, total) for done, total, _ in told] == [
      (1, 4), (2, 4), (3, 4), (4, 4),
  ]
  assert told[0][2]['model'] == protocol.summarize(scored[0], 1)
  assert told[-1][2] == results


def test_damaged_logits_are_reported_with_the_model():
  chunks = protocol.chunk_tokens(np.arange(8), 8, bos_id=0)
  logits = np.full((3, 8), np.nan, np.float32)
  with pytest.raises(errors.UserError, match='student: .* not finite'):
    protocol.accumulate(
        chunks, lambda c: {'student': protocol.token_scores(logits, c[5:])}
    )


def test_the_base_comes_first():
  names = ['a', 'b', 'c']
  assert list(protocol.in_order(names, 'b')) == ['b', 'a', 'c']
  assert list(protocol.in_order(names, None)) == names


def test_an_unknown_base_is_refused_with_the_choices():
  with pytest.raises(errors.UserError, match="'x' is not .* one of a, b"):
    list(protocol.in_order(['a', 'b'], 'x'))
