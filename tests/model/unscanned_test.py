"""Layers with paths of their own compute what stacked ones do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.model import config as model_config
from gemma_qat.model import transformer
from gemma_qat.model import weights

SCANNED = model_config.variant('tiny')
ALONE = dataclasses.replace(SCANNED, is_scanned=False)


@pytest.fixture(scope='module')
def by_layer():
  draw = np.random.default_rng(0)
  return {
      name: draw.standard_normal(spec.shape, np.float32) * 0.1
      for name, spec in weights.by_layer_specs(SCANNED).items()
  }


def test_every_layer_has_a_path_and_goes_back_to_its_name(by_layer):
  tree = weights.stack(ALONE, by_layer)
  assert set(tree) == {'embedding', 'final_norm', 'tail'}
  assert set(tree['tail']) == {f'layer_{i}' for i in range(8)}
  back = weights.unstack(ALONE, tree)
  assert list(back) == list(by_layer)
  assert all(np.array_equal(back[n], by_layer[n]) for n in back)


def test_hidden_states_are_the_same(by_layer):
  tokens = np.random.default_rng(1).integers(0, 512, (2, 24), np.int32)
  hidden = [
      jax.jit(transformer.Transformer(
          c, dtype=jnp.float32, attention='mapped'
      ).apply)({'params': weights.stack(c, by_layer)}, tokens)
      for c in (SCANNED, ALONE)
  ]
  np.testing.assert_allclose(*hidden, rtol=1e-4, atol=1e-4)


def test_whether_layers_are_scanned_is_a_truth_value():
  with pytest.raises(errors.UserError, match="is_scanned 'no', expected True"):
    dataclasses.replace(SCANNED, is_scanned='no')
