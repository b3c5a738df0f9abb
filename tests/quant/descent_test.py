"""Descent never loses more, and ends where no single change is better."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.quant import descent
from gemma_qat.quant import formats

_Q4_0 = formats.FORMATS['q4_0']
_SAFE = formats.bf16_safe(_Q4_0)


def _problem(rows=24, columns=96):
  """A weight, and the second moments of inputs that depend on each other."""
  rng = np.random.default_rng(0)
  inputs = rng.standard_normal((400, 12)) @ rng.standard_normal((12, columns))
  inputs += 0.5 * rng.standard_normal(inputs.shape)
  weight = 0.05 * rng.standard_normal((rows, columns))
  return weight.astype(np.float32), inputs.T @ inputs / len(inputs)


def _loss(weight, quantized, hessian, format=_Q4_0):
  error = np.asarray(format.dequantize(quantized), np.float64) - weight
  return np.einsum('ri,ij,rj->r', error, hessian, error)


@pytest.mark.parametrize('format', [_Q4_0, _SAFE], ids=['q4_0', 'bf16-safe'])
def test_no_row_loses_more_with_any_pass(format):
  weight, hessian = _problem()
  start = format.quantize(jnp.asarray(weight))
  losses = [
      _loss(weight, descent.descend(weight, hessian, start, format, n), hessian,
            format)
      for n in range(4)
  ]
  for before, after in zip(losses, losses[1:]):
    assert np.all(after <= before * (1 + 1e-5))
  assert losses[-1].sum() < 0.5 * losses[0].sum()


def test_in_the_end_no_other_code_is_better():
  weight, hessian = _problem()
  found = descent.descend(
      weight, hessian, _Q4_0.quantize(jnp.asarray(weight)), _Q4_0, 40
  )
  codes, scale = np.asarray(found.codes), found.scale
  least = _loss(weight, found, hessian)
  for column in range(0, weight.shape[1], 5):
    for step in (-1, 1):
      other = codes.copy()
      other[:, column] = np.clip(other[:, column] + step, 0, 15)
      loss = _loss(weight, formats.Quantized(other, scale), hessian)
      assert np.all(loss >= least * (1 - 1e-5))


def test_scales_are_the_formats_and_nearly_the_best_for_the_codes():
  weight, hessian = _problem()
  found = descent.descend(
      weight, hessian, _Q4_0.quantize(jnp.asarray(weight)), _Q4_0, 40
  )
  np.testing.assert_array_equal(found.scale, _Q4_0.stored_scale(found.scale))
  least = _loss(weight, found, hessian)
  for factor in (0.98, 1.02):
    for block in range(found.scale.shape[1]):
      scale = np.array(found.scale)
      scale[:, block] *= factor
      other = formats.Quantized(found.codes, _Q4_0.stored_scale(scale))
      assert np.all(_loss(weight, other, hessian) >= least * (1 - 1e-5))


def test_anchored_blocks_keep_their_scale_and_their_anchor():
  weight, hessian = _problem()
  start = _SAFE.quantize(jnp.asarray(weight))
  found = descent.descend(weight, hessian, start, _SAFE)
  np.testing.assert_array_equal(found.scale, start.scale)
  was_lowest = np.asarray(start.codes) == 0
  assert np.all(np.asarray(found.codes)[was_lowest] == 0)
  assert np.any(np.asarray(found.codes) != np.asarray(start.codes))


def test_blocks_of_zeros_stay():
  weight, hessian = _problem()
  weight[:, 32:64] = 0
  start = _Q4_0.quantize(jnp.asarray(weight))
  found = descent.descend(weight, hessian, start, _Q4_0)
  np.testing.assert_array_equal(found.scale[:, 1], start.scale[:, 1])
  assert np.all(np.isfinite(_Q4_0.dequantize(found)))


def test_no_pass_changes_nothing():
  weight, hessian = _problem()
  start = _Q4_0.quantize(jnp.asarray(weight))
  assert descent.descend(weight, hessian, start, _Q4_0, 0) is start
