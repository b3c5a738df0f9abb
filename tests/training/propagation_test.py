"""Layers that are rounded in order lose less than layers rounded alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model

from gemma_qat import errors
from gemma_qat.model import layers
from gemma_qat.model import transformer
from gemma_qat.quant import formats
from gemma_qat.training import propagation
from gemma_qat.training import starts

TOKENS = small_model.BATCH['tokens']


def values(params, found, plan=small_model.PLAN):
  """The tree that a student of these codes multiplies with."""
  flat = small_model.flat(params)
  for path, made in found.items():
    flat[path] = plan[path][0].dequantize(formats.Quantized(*made))
  return small_model.nested(flat)


def round_in_order(params, share, plan=small_model.PLAN, tokens=TOKENS, **more):
  return propagation.round_in_order(
      small_model.make_model(), params, params['embedding'], plan,
      np.split(tokens, 2), share, **more,
  )


@pytest.fixture(scope='module', params=[0.0, 0.5, 1.0])
def made(request, params):
  return request.param, round_in_order(params, request.param)


def test_every_matrix_of_the_layers_gets_codes_of_its_shape(params, made):
  flat = small_model.flat(params)
  paths = {p for p in small_model.PLAN if '/' in p}
  assert set(made[1]) == paths
  for path, (codes, scale) in made[1].items():
    assert codes.shape == flat[path].shape
    assert scale.shape == (*codes.shape[:-1], codes.shape[-1] // 32)
    assert np.min(codes) >= 0 and np.max(codes) <= 15
    np.testing.assert_array_equal(scale, np.float16(scale))


def test_the_first_matrices_read_what_the_teachers_read(params, grams, made):
  # Nothing was lost before them, whatever the share.
  alone = small_model.init_student(params, small_model.PLAN, 'gptq', grams)
  path = 'groups/layer_0/attn_q'
  codes = small_model.node(alone, path)['codes']
  assert np.mean(codes[0] != made[1][path].codes[0]) < 0.01


def test_making_up_brings_the_outputs_nearer(params, grams):
  apply = jax.jit(
      lambda tree: small_model.make_model().apply({'params': tree}, TOKENS)
  )
  teacher = apply(params)
  distance = lambda found: float(
      jnp.linalg.norm(apply(values(params, found)) - teacher)
  )
  alone = small_model.init_student(params, small_model.PLAN, 'gptq', grams)
  alone = {
      p: small_model.stored(alone, p, small_model.PLAN[p])
      for p in small_model.PLAN if '/' in p
  }
  found = {s: distance(round_in_order(params, s)) for s in (0.0, 0.5)}
  assert found[0.5] < 0.95 * found[0.0]
  assert found[0.5] < 0.95 * distance(alone)


@pytest.mark.parametrize('name, value, message', [
    ('attn_v', np.inf, 'layer_0/attn_v holds'),
    ('mlp_pre_norm', 3e38, 'The inputs of layer_0/mlp_gate holds'),
])
def test_numbers_that_are_not_finite_are_named(params, name, value, message):
  flat = small_model.flat(params)
  path = f'groups/layer_0/{name}'
  flat[path] = np.full_like(flat[path], value)
  with pytest.raises(errors.UserError, match=message):
    round_in_order(small_model.nested(flat), 0.5)


def test_layers_are_counted(params):
  heard = []
  round_in_order(params, 0.5, on_layer=heard.append)
  assert heard == [0, 1]


def test_a_layer_alone_is_the_layer_of_the_network(params):
  model = small_model.make_model()
  x = transformer.embed(model, jnp.take(params['embedding'], TOKENS, axis=0))
  for layer in range(small_model.CONFIG.num_layers):
    weights = {n: w[layer] for n, w in params['groups']['layer_0'].items()}
    x, read = transformer.apply_layer(model, layer, weights, x)
  assert set(read) == set(transformer.READERS)
  assert read['mlp_down'].shape == (*TOKENS.shape, 128)
  x = layers.rms_norm(
      x, params['final_norm'], small_model.CONFIG.norm_epsilon
  )
  np.testing.assert_allclose(
      x, model.apply({'params': params}, TOKENS), rtol=2e-4, atol=2e-4
  )


def test_other_formats_keep_their_own_rounding(params):
  plan = small_model.make_plan(rules=((r'mlp_down$', 'q8_0'),
                                      (r'mlp_up$', 'q4_0')))
  found = round_in_order(params, 0.5, plan)
  assert set(found) == {'groups/layer_0/mlp_down', 'groups/layer_0/mlp_up'}
  down = params['groups']['layer_0']['mlp_down']
  expected = formats.FORMATS['q8_0'].quantize(down, 1)
  np.testing.assert_array_equal(
      found['groups/layer_0/mlp_down'].codes, expected.codes
  )


@pytest.mark.parametrize('mode', ['codes', 'learned'])
def test_a_student_starts_at_the_codes_that_were_found(params, mode):
  plan = small_model.make_plan_of(mode)
  found = round_in_order(params, 0.5, plan)
  student = starts.init_student(
      small_model.CONFIG, params, plan, 'gptq', found=found
  )
  for path, made in found.items():
    stored = small_model.stored(student, path, plan[path])
    np.testing.assert_array_equal(stored.codes, made.codes)
    np.testing.assert_array_equal(stored.scale, made.scale)
