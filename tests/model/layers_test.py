"""The pieces of a layer compute what their definitions say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.model import layers


def _normal(seed, *shape):
  # NumPy draws: each shape would cost JAX a compilation.
  draw = np.random.default_rng(seed).standard_normal(shape, np.float32)
  return jnp.asarray(draw)


def _value_and_gradients(f, *args):
  """f's output, and the gradients of a fixed random projection of it."""
  @jax.jit
  def run(*args):
    def projected(*args):
      out = f(*args)
      return jnp.sum(out * _normal(99, *out.shape)), out
    every = tuple(range(len(args)))
    return jax.value_and_grad(projected, every, has_aux=True)(*args)
  (_, out), gradients = run(*args)
  return out, *gradients


@pytest.mark.parametrize('x_shape, w_shape, contraction, equation', [
    ((2, 5, 12), (3, 4, 12), 1, 'bld,nhd->blnh'),
    ((2, 5, 3, 4), (12, 3, 4), 2, 'blnh,dnh->bld'),
    ((7, 12), (6, 12), 1, 'td,fd->tf'),
])
def test_contract_and_its_gradients_are_einsums(
    x_shape, w_shape, contraction, equation
):
  x, w = _normal(0, *x_shape), _normal(1, *w_shape)
  ours = lambda x, w: layers.contract(x, w, contraction, jnp.float32)
  plain = lambda x, w: jnp.einsum(equation, x, w)
  found = _value_and_gradients(ours, x, w)
  for a, b in zip(found, _value_and_gradients(plain, x, w)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_contract_in_bfloat16_keeps_float32_sums_and_the_inputs_dtypes():
  x, w = _normal(0, 4, 512), _normal(1, 8, 512).astype(jnp.bfloat16)
  ours = lambda x, w: layers.contract(x, w, 1, jnp.bfloat16)
  exact = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(
      w, np.float64
  ).T
  out, dx, dw = _value_and_gradients(ours, x, w)
  assert out.dtype == jnp.float32
  # Products of bfloat16 are exact in float32; sums of 512 of them nearly so.
  np.testing.assert_allclose(out, exact, atol=1e-3)
  assert (dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16)


def test_gram_sums_outer_products_over_tokens():
  x = _normal(0, 2, 3, 4, 5)
  rows = np.asarray(x, np.float64).reshape(-1, 20)
  expected = sum(np.outer(row, row) for row in rows)
  np.testing.assert_allclose(layers.gram(x, 2), expected, rtol=1e-5, atol=1e-5)


def test_rms_norm_has_unit_root_mean_square_times_one_plus_gain():
  x, gain = 100 * _normal(0, 3, 64), _normal(1, 64)
  y = np.asarray(layers.rms_norm(x, gain, 1e-6)) / (1 + np.asarray(gain))
  np.testing.assert_allclose(np.mean(y**2, axis=-1), 1, rtol=1e-5)
  by_hand = np.asarray(x, np.float64)
  by_hand /= np.sqrt(np.mean(by_hand**2, axis=-1, keepdims=True))
  np.testing.assert_allclose(y, by_hand, rtol=1e-4)


def test_rms_norm_of_zeros_is_zero_and_has_a_gradient():
  x, gain = jnp.zeros((1, 8)), jnp.ones(8)
  norm = lambda x, gain: layers.rms_norm(x, gain, 1e-6)
  out, *gradients = _value_and_gradients(norm, x, gain)
  assert not np.any(out)
  assert all(np.isfinite(g).all() for g in gradients)


def test_rms_norm_returns_the_dtype_it_gets():
  x = _normal(0, 2, 8).astype(jnp.bfloat16)
  assert layers.rms_norm(x, jnp.zeros(8), 1e-6).dtype == jnp.bfloat16


def test_rope_products_depend_on_the_distance_alone():
  q, k = _normal(0, 1, 1, 1, 32), _normal(1, 1, 1, 1, 32)
  def product(i, j):
    at = lambda x, p: layers.rope(x, jnp.full((1, 1), p), 10_000.0, 1.0)
    return float(jnp.sum(at(q, i) * at(k, j)))
  assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
  assert product(7, 3) == pytest.approx(product(4, 0), abs=1e-4)
  assert abs(product(7, 3) - product(3, 7)) > 1e-2


def test_rope_keeps_lengths_and_leaves_position_zero_alone():
  x = _normal(0, 2, 6, 3, 32)
  positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
  rotated = np.asarray(layers.rope(x, positions, 1e6, 8.0))
  np.testing.assert_allclose(
      np.linalg.norm(rotated, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
  )
  np.testing.assert_array_equal(rotated[:, 0], x[:, 0])


def test_rope_scaling_divides_positions():
  x = _normal(0, 1, 4, 2, 32)
  positions = jnp.arange(4)[None]
  np.testing.assert_allclose(
      layers.rope(x, 8 * positions, 1e6, 8.0),
      layers.rope(x, positions, 1e6, 1.0),
      rtol=1e-6, atol=1e-6,
  )


def test_gelu_is_the_tanh_approximation():
  x = np.linspace(-5, 5, 41)
  expected = 0.5 * x * (
      1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
  )
  np.testing.assert_allclose(
      layers.gelu(jnp.asarray(x, jnp.float32)), expected, atol=1e-6
  )
