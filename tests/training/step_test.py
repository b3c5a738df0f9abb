"""One step brings the student nearer, the same on every mesh."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model

from gemma_qat import sharding
from gemma_qat.training import optimizer as optimizer_lib
from gemma_qat.training import settings
from gemma_qat.training import step as step_lib
from gemma_qat.training import student as student_lib
from gemma_qat.training import watching

STEPS = 6
OPTIMIZER = settings.OptimizerSettings(
    name='adam', moments='float32', learning_rate=0.01,
    multipliers={'scales': 1.0, 'norms': 0.3, 'weights': 0.1},
    warmup_steps=0, clip=1.0, b1=0.9, b2=0.95, epsilon=1e-8,
    average=0.0, dampening=0.0,
)
# What each mode can train; not every leaf, for each has to be compiled.
FROZEN = (r'^embedding', None)
NORMS = (r'(mlp_pre|final)_norm$', 'norms')
RULES = {
    'codes': (FROZEN, (r'/scale$', 'scales'), NORMS),
    'learned': (
        FROZEN, (r'mlp_.*/scale$', 'scales'), (r'mlp_.*/master$', 'weights')
    ),
    'derived': (FROZEN, NORMS, (r'mlp_(gate|up|down)$', 'weights')),
    'fixed': (FROZEN, NORMS),
    'lora4': (
        FROZEN, (r'mlp_.*/scale$', 'scales'), (r'mlp_.*/lora_[ab]$', 'weights')
    ),
}


# Parts of it have masks of 14 to 50 positions.
UNEVEN = small_model.BATCH | {
    'mask': np.arange(20)[None] < np.array([[20, 2, 9, 1, 17, 5, 4, 6]]).T
}


def _prepare(params, mode, mesh=None, accumulate=1, **changes):
  """Returns (step, state, frozen, teacher, batch), placed on the mesh."""
  plan = small_model.make_plan_of(mode)
  student = small_model.init_student(params, plan)
  groups = student_lib.groups(student, RULES[mode])
  trained, frozen = student_lib.split(student, groups)
  optimizer = optimizer_lib.make_optimizer(
      dataclasses.replace(OPTIMIZER, **changes), STEPS, groups
  )
  loss = step_lib.make_loss(
      small_model.make_model(plan), small_model.make_model(), kl_block=50,
      train_head=False,
  )
  # The teacher as a flat dict, like the parts of the student.
  teacher, batch = student_lib.split(params, {})[1], small_model.BATCH
  if mesh is not None:
    trained, frozen, teacher = (
        jax.device_put(
            flat, student_lib.shardings(mesh, small_model.CONFIG, flat)
        )
        for flat in (trained, frozen, teacher)
    )
    batch = jax.device_put(batch, sharding.named(mesh, ('batch', None)))
  return (
      jax.jit(step_lib.make_step(loss, optimizer, groups, accumulate)),
      step_lib.init_state(trained, optimizer),
      frozen,
      student_lib.join({}, teacher),
      batch,
  )


@pytest.mark.parametrize('mode', RULES)
def test_steps_on_one_batch_lower_its_divergence(params, mode):
  step, state, *rest = _prepare(params, mode)
  before, kl = jax.device_get(state.trained), []
  for _ in range(STEPS):
    state, metrics = step(state, *rest)
    kl.append(float(metrics['kl_nats']))
  assert int(state.step) == STEPS
  assert metrics.keys() == {'loss', 'kl_nats', *watching.NAMES} | {
      f'gradient_norm/{group}' for _, group in RULES[mode] if group
  }
  assert 0 < kl[-1] < 0.97 * kl[0]
  after = jax.device_get(state.trained)
  assert after.keys() == before.keys()
  for path in before:
    assert (after[path] != before[path]).any(), path
  for path in (p for p in before if p.endswith('/scale')):
    np.testing.assert_array_equal(np.sign(after[path]), np.sign(before[path]))


@pytest.fixture(scope='module')
def on_one_device(params):
  step, *arguments = _prepare(params, 'codes')
  return jax.device_get(step(*arguments))


@pytest.mark.parametrize('sizes', [
    dict(data=8), dict(data=4, fsdp=2), dict(data=2, fsdp=2, tensor=2),
], ids=str)
def test_a_step_is_the_same_on_every_mesh(params, on_one_device, sizes):
  mesh = sharding.make_mesh(**sizes)
  step, *arguments = _prepare(params, 'codes', mesh)
  expected_state, expected_metrics = on_one_device
  state, metrics = jax.device_get(step(*arguments))
  for name, value in expected_metrics.items():
    assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4), name
  # Adam's first moment is a multiple of the clipped gradient. Measured: they
  # differ by 9e-6 of the largest.
  for found, expected in zip(
      jax.tree.leaves(state.optimizer),
      jax.tree.leaves(expected_state.optimizer), strict=True,
  ):
    scale = max(np.abs(expected).max(), 1e-12)
    assert np.abs(found - expected).max() < 1e-4 * scale
  for path, expected in expected_state.trained.items():
    np.testing.assert_allclose(state.trained[path], expected, atol=2e-4)


def _run(params, **how):
  """Trains on the uneven batch; returns the metrics and state of each step."""
  step, state, frozen, teacher, _ = _prepare(params, 'derived', **how)
  history = []
  for _ in range(STEPS):
    state, metrics = step(state, frozen, teacher, UNEVEN)
    history.append(jax.device_get((metrics, state)))
  return history


@pytest.fixture(scope='module')
def plain(params):
  return _run(params)


@pytest.mark.parametrize('parts', [2, 4])
def test_a_batch_in_parts_makes_the_step_of_the_whole(params, plain, parts):
  for (metrics, state), (expected, expected_state) in zip(
      _run(params, accumulate=parts), plain
  ):
    for name, value in expected.items():
      assert float(metrics[name]) == pytest.approx(float(value), rel=1e-3)
    if state.step == 1:
      # As on meshes: the first moment is the clipped gradient. Later steps
      # differ by codes that flip.
      for found, moment in zip(
          jax.tree.leaves(state.optimizer),
          jax.tree.leaves(expected_state.optimizer), strict=True,
      ):
        scale = max(np.abs(moment).max(), 1e-12)
        assert np.abs(found - moment).max() < 1e-4 * scale


@pytest.mark.parametrize('state, tolerance', [
    # Largest difference of the KL from float32's in six steps, over what the
    # steps won; measured: TODO.
    ({'moments': 'bfloat16'}, 0.01), ({'moments': 'int8'}, 0.05),
], ids=str)
def test_small_moments_train_as_float32_does(params, plain, state, tolerance):
  kl = [float(metrics['kl_nats']) for metrics, _ in _run(params, **state)]
  expected = [float(metrics['kl_nats']) for metrics, _ in plain]
  won = expected[0] - expected[-1]
  assert won > 0.03 * expected[0]
  print(kl, expected, np.abs(np.subtract(kl, expected)).max() / won)
  assert 0 < np.abs(np.subtract(kl, expected)).max() < tolerance * won


def test_adafactor_lowers_the_divergence(params):
  kl = [
      float(metrics['kl_nats'])
      for metrics, _ in _run(params, name='adafactor')
  ]
  assert 0 < kl[-1] < 0.97 * kl[0]


def test_a_score_in_parts_is_that_of_the_whole(params, student):
  loss = step_lib.make_loss(
      small_model.make_model(small_model.PLAN), small_model.make_model(), 50,
      False,
  )
  trained, frozen = student_lib.split(student, {'final_norm'})
  whole, parts = (
      float(jax.jit(step_lib.make_score(loss, n))(
          trained, frozen, params, UNEVEN
      )) for n in (1, 4)
  )
  assert parts == pytest.approx(whole, rel=1e-5)


def test_a_batch_in_parts_stays_on_its_devices(params):
  mesh = sharding.make_mesh(data=4, devices=jax.devices()[:4])
  step, *arguments = _prepare(params, 'derived', mesh, accumulate=2)
  program = step.lower(*arguments).compile().as_text()
  assert re.search(r'all-reduce(-start)?\(', program)
  assert not re.search(r'(all-to-all|collective-permute)(-start)?\(', program)


def test_positions_outside_the_mask_do_not_count(params, student):
  loss = jax.jit(step_lib.make_loss(
      small_model.make_model(small_model.PLAN), small_model.make_model(), 50,
      False,
  ))
  tokens, mask = small_model.BATCH['tokens'], small_model.BATCH['mask'].copy()
  mask[:, 15:] = False
  changed = tokens.copy()
  changed[:, 15:] = 5  # Causal: nothing before reads them.
  def mean(batch):
    sums = loss(student, params, batch)
    assert sums.count == batch['mask'].sum()
    return float(sums.kl_nats / sums.count)
  one, other = (mean({'tokens': t, 'mask': mask}) for t in (tokens, changed))
  assert one == pytest.approx(other, rel=1e-6)
  whole = mean(small_model.BATCH)
  assert abs(whole - one) > 1e-4 * one


def _with_nan(params, name):
  """A step whose loss is finite, the gradient of one leaf is not."""
  step, state, frozen, teacher, batch = _prepare(params, 'codes')
  del step
  groups = student_lib.groups(
      student_lib.join(state.trained, frozen), RULES['codes']
  )
  optimizer = optimizer_lib.make_optimizer(OPTIMIZER, STEPS, groups)

  def loss(student, teacher, batch):
    leaf = student_lib.split(student, groups)[0][name]
    # The root of 0 has an infinite slope.
    odd = jnp.sqrt(jnp.where(batch['odd'] > 0, 0.0, 1.0) + 0 * jnp.sum(leaf))
    value = odd + sum(
        jnp.sum(x) for x in student_lib.split(student, groups)[0].values()
    )
    return step_lib.Sums(value, value, jnp.float32(1))

  make = jax.jit(step_lib.make_step(loss, optimizer, groups))
  run = lambda state, odd: make(
      state, frozen, teacher, batch | {'odd': jnp.float32(odd)}
  )
  return run, state, sorted(groups)


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counts(params):
  run, state, leaves = _with_nan(params, 'final_norm')
  state, fine = run(state, 0)
  assert int(fine['culprit']) == -1 and not int(fine['skipped_steps'])
  for times in (1, 2):
    after, scalars = run(state, 1)
    assert leaves[int(scalars['culprit'])] == 'final_norm'
    assert np.isfinite(scalars['loss'])
    assert int(scalars['skipped_in_row']) == times
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.trained, after.optimizer), (state.trained, state.optimizer),
    )
    assert int(after.step) == int(state.step) + 1
    state = after
  after, scalars = run(state, 0)
  assert int(scalars['skipped_in_row']) == 0
  assert int(scalars['skipped_steps']) == 2
  moved = [np.any(np.asarray(after.trained[p] != state.trained[p]))
           for p in leaves]
  assert all(moved)
