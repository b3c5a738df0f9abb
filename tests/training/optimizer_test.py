"""Each group moves at its own rate, scales in proportion to themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_qat.training import optimizer as optimizer_lib
from gemma_qat.training import settings

SETTINGS = settings.OptimizerSettings(
    name='adam', moments='float32', learning_rate=0.01,
    multipliers={'scales': 1.0, 'norms': 0.3}, warmup_steps=0,
    clip=0.0, b1=0.9, b2=0.95, epsilon=1e-8,
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


def test_scales_move_relatively_and_other_leaves_absolutely():
  updates = _updates(SETTINGS, GRADIENTS)
  # Adam's first step has size 1 whatever the gradient.
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
