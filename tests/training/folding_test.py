"""Scaled channels compute the same, and round to less of an error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model

from gemma_qat.model import config as model_config
from gemma_qat.model import transformer
from gemma_qat.model import weights
from gemma_qat.quant import formats
from gemma_qat.training import calibration
from gemma_qat.training import folding
from gemma_qat.training import settings
from gemma_qat.training import student as student_lib

# Two key/value heads with two query heads each; a group of two and a tail.
CONFIG = dataclasses.replace(
    model_config.variant('tiny'), num_layers=3, pattern=2, vocab_size=128,
    num_heads=4, num_kv_heads=2,
)
TOKENS = small_model.BATCH['tokens']


def _model(intercept=transformer.identity):
  return transformer.Transformer(
      CONFIG, intercept, dtype=jnp.float32, remat='none'
  )


@pytest.fixture(scope='module')
def params():
  rng = np.random.default_rng(0)
  flat = {}
  for name, spec in weights.by_layer_specs(CONFIG).items():
    spread = spec.row_length**-0.5 if spec.contraction else 0.2
    flat[name] = rng.standard_normal(spec.shape, np.float32) * spread
    if name.endswith('pre_norm'):
      # A few channels are an order of magnitude louder, as in real models.
      flat[name][::17] += np.float32(12)
  return jax.tree.map(np.float32, weights.stack(CONFIG, flat))


@pytest.fixture(scope='module')
def grams(params):
  return calibration.gather_grams(_model(), params, [TOKENS])


@pytest.fixture(scope='module')
def plan():
  return student_lib.make_plan(CONFIG, settings.QuantSettings(
      rules=((small_model.MATRICES, 'q4_0'),), modes=((r'.', 'codes'),),
      start='reference', calibration_tokens=1, fold=True,
      error_propagation=0.0, straight_through='auto',
      bf16_safe_scales=False,
  ))


@pytest.fixture(scope='module')
def folded(params, grams, plan):
  return folding.fold(CONFIG, params, grams, plan)


def _hidden(params):
  return np.asarray(_model().apply({'params': params}, TOKENS))


def test_the_function_is_the_same(params, folded):
  expected = _hidden(params)
  np.testing.assert_allclose(
      _hidden(folded[0]), expected, atol=2e-4 * np.abs(expected).max()
  )


def test_every_kind_of_place_is_used(params, folded):
  changed = {
      path.rpartition('/')[2]
      for path, x in small_model.flat(folded[0]).items()
      if (x != small_model.flat(params)[path]).any()
  }
  assert changed == {
      'attn_pre_norm', 'attn_q', 'attn_k', 'attn_v', 'attn_o',
      'mlp_pre_norm', 'mlp_gate', 'mlp_up', 'mlp_down',
  }


def test_grams_are_those_of_the_new_activations(folded):
  found = calibration.gather_grams(_model(), folded[0], [TOKENS])
  for path, gram in folded[1].items():
    np.testing.assert_allclose(
        gram, found[path], rtol=1e-3, atol=1e-3 * np.abs(gram).max(),
        err_msg=path,
    )


def test_rounding_loses_less(params, folded):
  q4_0 = formats.get('q4_0')
  def error(tree):
    rounded = jax.tree_util.tree_map_with_path(
        lambda path, x: q4_0.fake_quantize(x) if x.ndim > 1
        and path[-1].key.startswith(('attn', 'mlp'))
        and not path[-1].key.endswith('norm') else x,
        tree,
    )
    return np.mean(np.square(_hidden(rounded) - _hidden(params)))
  assert error(folded[0]) < 0.9 * error(params)


def test_what_is_not_quantized_is_left_alone(params, grams, plan):
  some = {p: e for p, e in plan.items() if p.endswith('mlp_down')}
  found, _ = folding.fold(CONFIG, params, grams, some)
  changed = {
      path.rpartition('/')[2]
      for path, x in small_model.flat(found).items()
      if (x != small_model.flat(params)[path]).any()
  }
  assert changed <= {'mlp_up', 'mlp_down'}


def test_all_places_are_reported(params, grams, plan):
  heard = []
  folding.fold(CONFIG, params, grams, plan, on_place=heard.append)
  assert len(heard) == folding.places(CONFIG) == len(set(heard))
