"""What a checkpoint keeps of a run comes back, or is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import orbax_files
from gemma_qat.model import config as model_config
from gemma_qat.training import optimizer as optimizer_lib
from gemma_qat.training import saving
from gemma_qat.training import settings
from gemma_qat.training import step as step_lib
from gemma_qat.training import student as student_lib

TRAINED = {'a/scale': jnp.arange(4.0), 'norm': jnp.ones(3)}
FROZEN = {'a/codes': np.arange(128, dtype=np.int8).reshape(4, 32)}


def _state(step):
  state = step_lib.init_state(TRAINED, optax.adam(0.1))
  moved = jax.tree.map(lambda x: x + step, state.optimizer)
  return state._replace(step=jnp.int32(step), optimizer=moved)


def _save(saver, step):
  manifest = orbax_files.manifest(
      model_config.variant('tiny'), {}, step, 'test'
  )
  saver.save(
      _state(step), FROZEN, manifest | {'data': {'next_index': 7}},
      {'bytes': np.zeros(3, np.uint8)},
  )


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  with saving.Saver(folder, keep=2) as saver:
    assert saver.latest is None
    for step in (1, 2, 3):
      _save(saver, step)
  return folder


def test_the_newest_step_comes_back_as_it_was(workdir):
  with saving.Saver(workdir, keep=2) as saver:
    assert saver.latest == 3
    student, leaves, manifest = saver.restore(3)
  assert manifest['step'] == 3 and manifest['data'] == {'next_index': 7}
  np.testing.assert_array_equal(student['a']['codes'], FROZEN['a/codes'])
  np.testing.assert_array_equal(student['a']['scale'], TRAINED['a/scale'])
  restored = saving.restore_optimizer(_state(0).optimizer, leaves)
  jax.tree.map(np.testing.assert_array_equal, restored, _state(3).optimizer)


def test_only_the_newest_steps_are_kept(workdir):
  assert {p.name for p in (workdir / saving.FOLDER).glob('[0-9]*')} == {
      '2', '3'
  }


def test_the_state_of_another_optimizer_is_refused(workdir):
  with saving.Saver(workdir, keep=2) as saver:
    _, leaves, _ = saver.restore(3)
  with pytest.raises(errors.UserError, match='another optimizer'):
    saving.restore_optimizer(optax.sgd(0.1, 0.9).init(TRAINED), leaves)


@pytest.mark.parametrize('state', [
    {'moments': 'float32'}, {'moments': 'bfloat16'}, {'moments': 'int8'},
    {'name': 'adafactor'},
], ids=str)
def test_every_optimizer_goes_on_bit_for_bit(state, tmp_path):
  draw = np.random.default_rng(0)
  start = {
      path: jnp.asarray(draw.standard_normal(shape, np.float32))
      for path, shape in (('w/master', (128, 160)), ('w/scale', (128, 5)),
                          ('norm', (64,)))
  }
  optimizer = optimizer_lib.make_optimizer(
      settings.OptimizerSettings(**{
          'name': 'adam', 'moments': 'float32', 'learning_rate': 0.1,
          'multipliers': {'all': 1.0}, 'warmup_steps': 2, 'clip': 1.0,
          'b1': 0.9, 'b2': 0.95, 'epsilon': 1e-8, 'average': 0.0,
          'dampening': 0.0, **state,
      }), 10, dict.fromkeys(start, 'all'),
  )

  @jax.jit
  def step(state):
    gradient = jax.tree.map(lambda x: jnp.sin(30 * x), state.trained)
    updates, kept = optimizer.update(gradient, state.optimizer, state.trained)
    return step_lib.State(
        state.step + 1, optax.apply_updates(state.trained, updates), kept
    )

  fresh = step_lib.init_state(start, optimizer)
  saved = step(step(fresh))
  manifest = orbax_files.manifest(model_config.variant('tiny'), {}, 2, 'test')
  with saving.Saver(tmp_path, keep=1) as saver:
    saver.save(saved, {}, manifest, {'bytes': np.zeros(3, np.uint8)})
  with saving.Saver(tmp_path, keep=1) as saver:
    student, leaves, _ = saver.restore(2)
  restored = step_lib.State(
      jnp.int32(2), dict(student_lib.split(student, start)[0]),
      saving.restore_optimizer(fresh.optimizer, leaves),
  )
  jax.tree.map(np.testing.assert_array_equal, restored, saved)
  jax.tree.map(np.testing.assert_array_equal, step(restored), step(saved))


def test_moments_of_another_type_are_refused(workdir):
  with saving.Saver(workdir, keep=2) as saver:
    _, leaves, _ = saver.restore(3)
  like = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16) if x.ndim else x, _state(0).optimizer
  )
  with pytest.raises(errors.UserError, match='another optimizer'):
    saving.restore_optimizer(like, leaves)


def test_a_step_that_is_not_there_is_refused(workdir):
  with saving.Saver(workdir, keep=2) as saver:
    with pytest.raises(errors.UserError, match='damaged'):
      saver.restore(99)
