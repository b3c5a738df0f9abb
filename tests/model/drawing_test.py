"""Tokens come as often as their logits say, and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.model import drawing

_DRAW = jax.jit(
    drawing.draw, static_argnames=('temperature', 'top_k', 'top_p')
)
# More than one block of the vocabulary, and not a whole number of them.
V = 700


def _draws(logits, count, **settings):
  rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, V))
  keys = jax.random.split(jax.random.key(0), count)
  return np.asarray(_DRAW(rows, keys, **settings))


def _logits(probabilities):
  """-inf wherever none is given."""
  logits = np.full(V, -np.inf, np.float32)
  for token, p in probabilities.items():
    logits[token] = np.log(p)
  return logits


def test_frequencies_are_the_probabilities():
  wanted = {3: 0.5, 511: 0.2, 512: 0.2, 699: 0.1}
  drawn = _draws(_logits(wanted), 2_000)
  assert set(drawn.tolist()) == set(wanted)
  for token, p in wanted.items():
    spread = (p * (1 - p) / 2_000) ** 0.5
    assert abs(np.mean(drawn == token) - p) < 4 * spread, token


def test_rare_tokens_are_drawn_too():
  # 699 tokens of together 20 %.
  logits = np.full(V, np.log(0.2 / 699), np.float32)
  logits[0] = np.log(0.8)
  drawn = _draws(logits, 2_000)
  rare = drawn[drawn > 0]
  assert 320 < len(rare) < 480
  assert len(np.unique(rare)) > 200


def test_temperature_flattens_and_zero_takes_the_likeliest():
  logits = _logits({5: 0.8, 600: 0.2})
  assert (_draws(logits, 50, temperature=0.0) == 5).all()
  # Square roots of the probabilities, 2 to 1.
  share = np.mean(_draws(logits, 2_000, temperature=2.0) == 5)
  assert abs(share - 2 / 3) < 0.04


def test_top_k_leaves_the_likeliest_in_their_proportions():
  logits = _logits({1: 0.4, 530: 0.3, 2: 0.2, 690: 0.1})
  drawn = _draws(logits, 2_000, top_k=2)
  assert set(drawn.tolist()) == {1, 530}
  assert abs(np.mean(drawn == 1) - 4 / 7) < 0.04
  drawn = _draws(logits, 2_000, top_k=10_000)
  assert set(drawn.tolist()) == {1, 530, 2, 690}


@pytest.mark.parametrize('top_p, left', [
    (0.3, {1}), (0.45, {1, 530}), (0.65, {1, 530}), (0.75, {1, 530, 2}),
    (0.95, {1, 530, 2, 690}),
])
def test_top_p_leaves_the_fewest_that_reach_it(top_p, left):
  logits = _logits({1: 0.4, 530: 0.3, 2: 0.2, 690: 0.1})
  assert set(_draws(logits, 600, top_p=top_p).tolist()) == left


def test_the_key_of_a_row_alone_decides():
  logits = jnp.zeros((6, V))
  keys = jax.random.split(jax.random.key(1), 6)
  together = _DRAW(logits, keys)
  alone = [int(_DRAW(logits[:1], k[None])[0]) for k in keys]
  assert together.tolist() == alone
  assert len(set(alone)) > 3
