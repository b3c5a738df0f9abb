"""Each group moves at its own rate, scales in proportion to themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_qat import errors
from gemma_qat import sharding
from gemma_qat.model import config as model_config
from gemma_qat.model import weights
from gemma_qat.quant import formats
from gemma_qat.quant import lattice
from gemma_qat.training import optimizer as optimizer_lib
from gemma_qat.training import settings

SETTINGS = settings.OptimizerSettings(
    name='adam', moments='float32', learning_rate=0.01,
    multipliers={'scales': 1.0, 'norms': 0.3}, warmup_steps=0,
    clip=0.0, b1=0.9, b2=0.95, epsilon=1e-8,
    average=0.0, dampening=0.0,
)
GROUPS = {'a/scale': 'scales', 'b/scale': 'scales', 'norm': 'norms'}
PARAMS = {
    'a/scale': jnp.array([1e-4, -2.0]), 'b/scale': jnp.array([3.0]),
    'norm': jnp.array([0.5, 0.0, -0.5]),
}


def _settings(**changes):
  return settings.OptimizerSettings(**{**SETTINGS.__dict__, **changes})


def _updates(s, gradients, groups=None, params=PARAMS, steps=100):
  optimizer = optimizer_lib.make_optimizer(s, steps, groups or GROUPS)
  state = optimizer.init(params)
  updates, _ = jax.jit(optimizer.update)(gradients, state, params)
  return jax.device_get(updates)


GRADIENTS = {
    'a/scale': jnp.array([5.0, 0.1]), 'b/scale': jnp.array([-0.2]),
    'norm': jnp.array([0.01, -7.0, 0.3]),
}


# Every way of keeping the state.
STATES = {
    'float32': {}, 'bfloat16': {'moments': 'bfloat16'},
    'int8': {'moments': 'int8'}, 'adafactor': {'name': 'adafactor'},
}


@pytest.mark.parametrize('state', STATES)
def test_scales_move_relatively_and_other_leaves_absolutely(state):
  updates = _updates(_settings(**STATES[state]), GRADIENTS)
  # The first step has size 1 whatever the gradient.
  np.testing.assert_allclose(updates['a/scale'], [-1e-6, -0.02], rtol=1e-3)
  np.testing.assert_allclose(updates['b/scale'], [0.03], rtol=1e-3)
  np.testing.assert_allclose(
      updates['norm'], [-0.003, 0.003, -0.003], rtol=1e-3
  )


def test_scales_keep_their_sign_under_a_gradient_that_pulls_them_over_zero():
  optimizer = optimizer_lib.make_optimizer(SETTINGS, 300, GROUPS)

  @jax.jit
  def step(state, params):
    gradient = jax.tree.map(jnp.sign, params)  # Towards zero, for ever.
    updates, state = optimizer.update(gradient, state, params)
    return state, optax.apply_updates(params, updates)

  state, params = optimizer.init(PARAMS), PARAMS
  for _ in range(200):
    state, params = step(state, params)
  for path in ('a/scale', 'b/scale'):
    assert (np.sign(params[path]) == np.sign(PARAMS[path])).all()
    assert (np.abs(params[path]) < 0.5 * np.abs(PARAMS[path])).all()


def test_a_scale_of_zero_stays_and_gives_no_nan():
  params = PARAMS | {'b/scale': jnp.zeros(1)}
  updates = _updates(SETTINGS, GRADIENTS, params=params)
  assert updates['b/scale'] == 0


def test_the_same_group_moves_block_scales_relatively_and_the_rest_not():
  groups = dict.fromkeys(PARAMS, 'norms')
  updates = _updates(SETTINGS, GRADIENTS, groups)
  np.testing.assert_allclose(updates['b/scale'], [0.009], rtol=1e-3)
  np.testing.assert_allclose(np.abs(updates['norm']), 0.003, rtol=1e-3)


def test_groups_are_clipped_apart():
  # epsilon is large against the clipped gradients: Adam's step shows their
  # size instead of 1.
  s = _settings(clip=1e-3, epsilon=1.0)
  alone = _updates(s, GRADIENTS)['norm']
  louder = dict(GRADIENTS, **{'a/scale': 1e6 * GRADIENTS['a/scale']})
  np.testing.assert_allclose(_updates(s, louder)['norm'], alone, rtol=1e-6)
  unclipped = _updates(_settings(epsilon=1.0), GRADIENTS)['norm']
  assert np.linalg.norm(alone) < 0.01 * np.linalg.norm(unclipped)


def test_the_rate_warms_up_to_its_peak_and_ends_at_zero():
  schedule = optimizer_lib.make_schedule(_settings(warmup_steps=10), 100)
  rates = [float(schedule(n)) for n in (0, 5, 10, 55, 100)]
  np.testing.assert_allclose(rates, [0, 0.005, 0.01, 0.005, 0], atol=1e-6)


def test_without_warm_up_the_first_step_has_the_peak_rate():
  schedule = optimizer_lib.make_schedule(SETTINGS, 100)
  assert float(schedule(0)) == pytest.approx(0.01)


@pytest.mark.parametrize('size', ['270m', '4b'])
@pytest.mark.parametrize('state, least, most', [
    ('float32', 8, 8.001), ('bfloat16', 4, 4.001), ('int8', 2.093, 2.1),
    ('adafactor', 0.004, 0.01),
])
def test_the_state_takes_the_bytes_a_weight_that_it_is_said_to(
    size, state, least, most
):
  trained = {
      path: jax.ShapeDtypeStruct(spec.shape, jnp.float32)
      for path, spec in weights.tree_specs(model_config.variant(size)).items()
  }
  optimizer = optimizer_lib.make_optimizer(
      _settings(**STATES[state]), 100, dict.fromkeys(trained, 'norms')
  )
  kept = jax.tree.leaves(jax.eval_shape(optimizer.init, trained))
  count = sum(x.size for x in trained.values())
  assert least <= sum(x.size * x.dtype.itemsize for x in kept) / count < most


def test_adafactor_knows_each_head_of_each_layer_by_its_rows_and_columns():
  # [G, N, H, D] and [G, D, N, H], as attention has them.
  draw = np.random.default_rng(0)
  size = lambda *shape: np.exp(draw.normal(0, 3, shape)).astype(np.float32)
  sign = draw.choice([-1.0, 1.0], (2, 3, 128, 256)).astype(np.float32)
  query = sign * size(2, 3, 128, 1) * size(2, 3, 1, 256)
  gradients = {
      'norm': jnp.asarray(query), 'b/scale': jnp.ones((1,)),
      'a/scale': jnp.asarray(np.moveaxis(query, 3, 1)),
  }
  # What is a product of rows and columns is known exactly: steps of size 1.
  params = jax.tree.map(jnp.ones_like, gradients)
  updates = _updates(
      _settings(name='adafactor', epsilon=1e-15), gradients, params=params
  )
  np.testing.assert_allclose(updates['norm'], -0.003 * sign, rtol=1e-3)
  np.testing.assert_allclose(
      updates['a/scale'], -0.01 * np.moveaxis(sign, 3, 1), rtol=1e-3
  )


def test_adafactors_decay_stops_at_b2():
  s = _settings(name='adafactor', b2=0.5, learning_rate=1.0)
  optimizer = optimizer_lib.make_optimizer(s, 10_000, GROUPS)

  @jax.jit
  def after(steps):
    def body(_, carry):
      return optimizer.update(GRADIENTS, carry[1], PARAMS)
    return jax.lax.fori_loop(
        0, steps, body, (GRADIENTS, optimizer.init(PARAMS))
    )[1]

  # Half of the second moment is the last gradient's.
  louder = dict(GRADIENTS, norm=3 * GRADIENTS['norm'])
  updates, _ = jax.jit(optimizer.update)(louder, after(50), PARAMS)
  # 3 / sqrt(0.5 + 0.5 * 9), held to a root mean square of 1.
  np.testing.assert_allclose(np.abs(updates['norm']), 0.3, rtol=1e-3)
  quieter = dict(GRADIENTS, norm=0.5 * GRADIENTS['norm'])
  updates, _ = jax.jit(optimizer.update)(quieter, after(50), PARAMS)
  expected = 0.3 * 0.5 / np.sqrt(0.5 + 0.5 * 0.25)
  np.testing.assert_allclose(np.abs(updates['norm']), expected, rtol=1e-2)


@pytest.mark.parametrize('state', STATES)
def test_updates_are_the_same_on_a_mesh(state):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  draw = np.random.default_rng(0)
  shapes = {'norm': (2, 128, 128), 'a/scale': (2, 128, 4), 'b/scale': (1,)}
  params, gradients = (
      {p: draw.standard_normal(s, np.float32) for p, s in shapes.items()}
      for _ in range(2)
  )
  axes = {'norm': ('layers', 'mlp', 'embed'),
          'a/scale': ('layers', 'mlp', 'embed'), 'b/scale': ('norm',)}
  place = lambda tree: {
      p: jax.device_put(x, sharding.named(mesh, axes[p]))
      for p, x in tree.items()
  }
  optimizer = optimizer_lib.make_optimizer(
      _settings(**STATES[state]), 100, GROUPS
  )

  @jax.jit
  def third(gradients, params):
    kept = optimizer.init(params)
    for _ in range(3):
      updates, kept = optimizer.update(gradients, kept, params)
    return updates

  expected = third(gradients, params)
  for path, found in third(place(gradients), place(params)).items():
    # The order of sums (Adafactor's) and of divisions may differ; random
    # numbers must not, their steps are of 1e-2.
    np.testing.assert_allclose(found, expected[path], rtol=1e-5)


def test_a_running_mean_forgets_its_start_and_follows():
  average = optimizer_lib.keep_average(0.9)
  params = {'w': jnp.array([100.0])}
  state = average.init(params)
  update = jax.jit(average.update)
  expected, seen = 100.0, []
  for t in range(40):
    change = {'w': jnp.array([-3.0])}
    passed, state = update(change, state, params)
    assert passed['w'] == -3
    params = {'w': params['w'] - 3}
    seen.append(float(params['w'][0]))
    kept = min(0.9, (1 + t) / (10 + t))
    expected = kept * expected + (1 - kept) * seen[-1]
  mean = float(optimizer_lib.averaged((state,))['w'][0])
  assert mean == pytest.approx(expected, rel=1e-4)
  assert seen[-1] < mean < seen[-15]
  assert optimizer_lib.averaged(optax.EmptyState()) is None


@pytest.mark.parametrize('mode', ['learned', 'derived'])
def test_dampening_draws_masters_to_what_they_round_to(mode):
  fmt = formats.get('q4_0')
  weight = jax.random.normal(jax.random.key(0), (2, 64))
  start = fmt.quantize(weight)
  leaf = 'm/master' if mode == 'learned' else 'm'
  params = {leaf: weight, 'other': weight}
  if mode == 'learned':
    params['m/scale'] = start.scale
  groups = dict.fromkeys(params, 'weights')
  plan = {'m': lattice.Entry(fmt, mode, 1)}
  damp = optimizer_lib.dampen(0.5, plan, groups)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(damp.update)(zeros, damp.init(params), params)
  if mode == 'learned':
    value = fmt.fake_quantize_learned(weight, start.scale)
  else:
    value = fmt.dequantize(start)
  np.testing.assert_allclose(updates[leaf], 0.5 * (weight - value), atol=1e-7)
  assert not np.any(updates['other'])


def test_dampening_without_the_scale_is_refused():
  plan = {'m': lattice.Entry(formats.get('q4_0'), 'learned', 1)}
  with pytest.raises(errors.UserError, match='needs the scale of m'):
    optimizer_lib.make_optimizer(
        _settings(dampening=0.1, multipliers={'weights': 1.0}), 10,
        {'m/master': 'weights'}, plan,
    )
