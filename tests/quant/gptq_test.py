import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.quant import formats
from gemma_qat.quant import gptq
from gemma_qat.quant import search

_Q4_0 = formats.FORMATS['q4_0']


def _weight(rows=64, columns=128):
  rng = np.random.default_rng(0)
  return rng.standard_normal((rows, columns)).astype(np.float32) * 0.05


def _hessian(columns=128, noise=1.0):
  """Second moments of inputs that a few directions dominate."""
  rng = np.random.default_rng(1)
  mix = rng.standard_normal((columns, 16))
  gains = np.exp(0.5 * rng.standard_normal(columns))
  inputs = rng.standard_normal((1000, 16)) @ mix.T
  inputs = (inputs + noise * rng.standard_normal(inputs.shape)) * gains
  return inputs.T @ inputs / len(inputs)


def _output_error(weight, quantized, hessian):
  error = np.asarray(_Q4_0.dequantize(quantized), np.float64) - weight
  return np.trace(error @ hessian @ error.T)


def _largest_first(hessian):
  """Block by block, the largest inputs first."""
  square = np.diag(hessian)
  block = np.repeat(square.reshape(-1, 32).sum(axis=1), 32)
  return np.lexsort((-square, np.arange(len(square)) // 32, -block))


def _in_numpy(weight, hessian, scale, damping, order):
  """Plain GPTQ at given scales: the inverse is updated, nothing is batched."""
  weight = weight.astype(np.float64)
  columns = len(hessian)
  inverse = np.linalg.inv(
      hessian + np.eye(columns) * damping * np.trace(hessian) / columns
  )
  codes = np.zeros(weight.shape, np.int8)
  for j in order:
    d = np.asarray(scale[:, j // 32], np.float64)
    level = np.clip(np.round(weight[:, j] / d), -8, 7)
    codes[:, j] = level + 8
    lost = (weight[:, j] - d * level) / inverse[j, j]
    weight = weight - np.outer(lost, inverse[j])
    inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
  return codes


def test_output_error_is_well_below_that_of_rounding_and_of_search():
  weight, hessian = _weight(), _hessian()
  rounded = _Q4_0.quantize(jnp.asarray(weight))
  searched = search.search_q4_0(weight, np.diag(hessian).astype(np.float32))
  ours = _output_error(weight, gptq.gptq_q4_0(weight, hessian), hessian)
  assert ours < 0.5 * _output_error(weight, rounded, hessian)
  assert ours < 0.5 * _output_error(weight, searched, hessian)


def test_codes_equal_plain_gptq_in_float64():
  weight, hessian = _weight(16), _hessian()
  ours = gptq.gptq_q4_0(weight, hessian, passes=0)
  order = _largest_first(hessian)
  theirs = _in_numpy(weight, hessian, ours.scale, 0.01, order)
  # float32 sums may tip a rounding that is nearly a tie, and what follows.
  assert np.mean(np.asarray(ours.codes) != theirs) < 0.01


def test_what_matters_most_is_rounded_first():
  weight, hessian = _weight(), _hessian()
  # The worst case for the natural order: the largest inputs come last.
  order = _largest_first(hessian)[::-1]
  hessian = hessian[np.ix_(order, order)]
  ours = gptq.gptq_q4_0(weight, hessian, passes=0)
  codes = _in_numpy(weight, hessian, ours.scale, 0.01, range(len(hessian)))
  natural = formats.Quantized(codes, ours.scale)
  assert _output_error(weight, ours, hessian) < 0.9 * _output_error(
      weight, natural, hessian
  )


def test_without_correlations_it_is_the_search():
  weight = _weight()
  diagonal = np.diag(_hessian()).astype(np.float32)
  ours = gptq.gptq_q4_0(weight, np.diag(diagonal), passes=0)
  searched = search.search_q4_0(weight, diagonal)
  np.testing.assert_array_equal(ours.codes, searched.codes)
  np.testing.assert_array_equal(ours.scale, searched.scale)


def test_inputs_that_were_never_active_do_no_harm():
  weight, hessian = _weight(), _hessian()
  hessian[:, 40:80] = 0
  hessian[40:80] = 0
  for h in (hessian, np.zeros_like(hessian)):
    quantized = gptq.gptq_q4_0(weight, h)
    values = np.asarray(_Q4_0.dequantize(quantized))
    assert np.max(np.abs(values[:, 40:80] - weight[:, 40:80])) < 0.1


def test_rows_do_not_depend_on_each_other():
  weight, hessian = _weight(), _hessian()
  whole = gptq.gptq_q4_0(weight, hessian)
  part = gptq.gptq_q4_0(weight[10:30], hessian)
  # Another number of rows may sum in another order and tip a near tie.
  assert np.mean(np.asarray(whole.codes[10:30] != part.codes)) < 0.01


def test_scales_are_float16_values():
  scale = gptq.gptq_q4_0(_weight(), _hessian()).scale
  np.testing.assert_array_equal(scale, _Q4_0.stored_scale(scale))


def test_a_hessian_of_another_size_is_named():
  with pytest.raises(errors.UserError, match=r'128 x 128.*\(64, 64\)'):
    gptq.gptq_q4_0(_weight(), _hessian(64))


def test_a_hessian_that_is_not_one_is_refused():
  with pytest.raises(errors.UserError, match='not positive semidefinite'):
    gptq.gptq_q4_0(_weight(), -_hessian())
  hessian = _hessian()
  hessian[3, 4] = np.nan
  with pytest.raises(errors.UserError, match='Hessian holds 1'):
    gptq.gptq_q4_0(_weight(), hessian)
