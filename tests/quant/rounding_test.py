"""Oracle: the casts of ml_dtypes and numpy, one after the other."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gemma_qat.quant import rounding


def _numbers():
  """All bfloat16 values, what lies halfway and beside, patterns: float32."""
  steps = np.arange(0x7F80, dtype=np.uint16).view(ml_dtypes.bfloat16)
  steps = steps.astype(np.float32)
  with np.errstate(over='ignore'):
    middles = steps[:-1] / 2 + steps[1:] / 2
  patterns = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
  patterns = patterns.view(np.float32)
  x = np.concatenate([
      steps, middles, np.nextafter(middles, 0), np.nextafter(middles, 1e38),
      [np.inf, np.float32(3.4e38)], patterns[~np.isnan(patterns)],
  ]).astype(np.float32)
  return np.concatenate([x, -x])


def _bfloat16(x):
  return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def _both(x):
  with np.errstate(over='ignore'):
    return _bfloat16(x).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize('jitted', [False, True])
@pytest.mark.parametrize('f, oracle', [
    (rounding.round_to_bfloat16, _bfloat16), (rounding.round_to_both, _both),
])
def test_rounding_equals_casts(f, oracle, jitted):
  x = _numbers()
  # XLA counts float32 subnormals as zeros.
  x = x[(x == 0) | (np.abs(x) >= 2.0**-126)]
  rounded = np.asarray((jax.jit(f) if jitted else f)(x))
  np.testing.assert_array_equal(
      rounded.view(np.uint32), oracle(x).view(np.uint32)
  )


def test_what_both_hold_is_not_rounded_again():
  once = np.asarray(rounding.round_to_both(_numbers()))
  once = once[np.isfinite(once)]
  assert once.max() == 65280 and once[once > 0].min() == 2.0**-24
  np.testing.assert_array_equal(_bfloat16(once), once)
  np.testing.assert_array_equal(once.astype(np.float16), once)


@pytest.mark.parametrize('units', range(-2, 3))
def test_from_a_quotient_that_is_nearly_right_the_nearest_is_found(units):
  rng = np.random.default_rng(1)
  x, y = (
      (rng.standard_normal(500_000) * np.exp2(rng.uniform(-40, 40, 500_000)))
      .astype(np.float32) for _ in range(2)
  )
  x[:100_000] = 1.0
  # Powers of two: the units below them are half as large.
  y[::7] = np.exp2(rng.integers(-40, 40, len(y[::7]))).astype(np.float32)
  expected = x / y
  about = (expected.view(np.int32) + units).view(np.float32)
  np.testing.assert_array_equal(
      jax.jit(rounding.nearest_quotient)(x, y, about), expected
  )


def test_divided_by_zero_is_zero():
  quotient = rounding.divide(jnp.float32([1, 0, -3]), jnp.float32([0, 0, 4]))
  np.testing.assert_array_equal(quotient, [0, 0, -0.75])
  np.testing.assert_array_equal(rounding.divide(jnp.float32([[2]]), 4), [[0.5]])


def test_what_is_no_normal_number_is_left_to_the_plain_division():
  x = np.float32([0, 1, np.inf, 1e-40, 1, -np.inf])
  y = np.float32([3, np.inf, 2, 2, 1e-40, 0.5])
  with np.errstate(over='ignore'):
    about = x / y
  np.testing.assert_array_equal(
      rounding.nearest_quotient(x, y, about), about
  )


def test_the_gradient_passes_straight_through():
  x = jnp.float32([0.1, -3e-6, 0.0, 70.3])
  g = jnp.float32([1.0, 2.0, 3.0, -4.0])
  for f in (rounding.round_to_bfloat16, rounding.round_to_both):
    loss = lambda x, f=f: jnp.vdot(f(x), g)
    np.testing.assert_array_equal(jax.grad(loss)(x), g)


def test_not_a_number_stays_one():
  for pattern in (0x7F800001, 0x7FFFFFFF, 0xFFC00000):
    x = np.uint32(pattern).view(np.float32)
    assert np.isnan(rounding.round_to_both(jnp.float32(x)))


@pytest.mark.parametrize('jitted', [False, True])
def test_the_bits_of_all_float16_values_are_found_and_read_back(jitted):
  run = jax.jit if jitted else lambda f: f
  bits = np.arange(2**16, dtype=np.uint16)
  x = bits.view(np.float16).astype(np.float32)
  bits, x = bits[~np.isnan(x)], x[~np.isnan(x)]
  found = run(rounding.float16_bits)(x)
  assert found.dtype == jnp.uint16
  np.testing.assert_array_equal(found, bits)
  back = np.asarray(run(rounding.from_float16_bits)(bits))
  np.testing.assert_array_equal(back.view(np.uint32), x.view(np.uint32))
