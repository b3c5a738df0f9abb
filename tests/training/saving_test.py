"""What a checkpoint keeps of a run comes back, or is refused."""

import json
import shutil

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


def _save(saver, step, heldout_kl=None):
  manifest = orbax_files.manifest(
      model_config.variant('tiny'), {}, step, 'test'
  )
  saver.save(
      _state(step), FROZEN, manifest | {'data': {'next_index': 7}},
      {'bytes': np.zeros(3, np.uint8)}, heldout_kl,
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
    _assert_is_step_3(saver)


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
        state.step + 1, optax.apply_updates(state.trained, updates), kept,
        state.skipped,
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
      saving.restore_optimizer(fresh.optimizer, leaves), fresh.skipped,
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
    with pytest.raises(errors.UserError, match='99.* cannot be read'):
      saver.restore(99)


def test_a_step_of_another_program_stays_where_it_is(tmp_path):
  with saving.Saver(tmp_path, keep=1) as saver:
    _save(saver, 1)
  file = tmp_path / 'checkpoints/1/manifest/data.json'
  said = json.loads(file.read_text())
  file.write_text(json.dumps(
      orbax_files.sealed(said | {'version': 99}, said['sums'])
  ))
  with pytest.raises(errors.UserError, match='version 99, .* that wrote it'):
    saving.newest_whole(tmp_path)
  assert saving.latest(tmp_path) == 1


def _files(folder):
  return sorted(p for p in folder.rglob('*') if p.is_file())


def _is_noticed(workdir):
  """Whether step 3 is not taken; it is moved away then, for good."""
  assert saving.newest_whole(workdir) in (2, 3)
  return saving.latest(workdir) == 2


def test_a_flipped_bit_or_a_lost_end_is_noticed_in_every_file(
    workdir, tmp_path, capsys
):
  names = [p.relative_to(workdir) for p in _files(workdir / 'checkpoints/3')]
  assert len(names) > 10
  trials = 0
  for name in names:
    # Arrays, their index and the manifest. What each process wrote before all
    # were joined lies beside them and is not read, nor are Orbax's notes.
    counts = name.name == 'data.json' or name.parent.name == 'd' or (
        name.name == 'manifest.ocdbt'
    )
    counts = counts and 'ocdbt.process_0' not in name.parts
    size = (workdir / name).stat().st_size
    for damage in ('flip', 'cut', 'remove'):
      copy = tmp_path / str(trials)
      shutil.copytree(workdir, copy)
      contents = bytearray((copy / name).read_bytes())
      if damage == 'flip' and size:
        contents[size // 2] ^= 4
      (copy / name).write_bytes(contents[:size // 2] if damage == 'cut'
                                else contents)
      if damage == 'remove':
        (copy / name).unlink()
      trials += 1
      is_noticed = _is_noticed(copy)
      assert is_noticed or not counts, (name, damage)
      if not is_noticed:
        with saving.Saver(copy, keep=2) as saver:
          _assert_is_step_3(saver)
      shutil.rmtree(copy)
  assert trials == 3 * len(names)
  assert 'moved to' in capsys.readouterr().err


def _assert_is_step_3(saver):
  student, leaves, manifest = saver.restore(3)
  assert manifest['step'] == 3 and manifest['data'] == {'next_index': 7}
  np.testing.assert_array_equal(student['a']['codes'], FROZEN['a/codes'])
  np.testing.assert_array_equal(student['a']['scale'], TRAINED['a/scale'])
  restored = saving.restore_optimizer(_state(0).optimizer, leaves)
  jax.tree.map(np.testing.assert_array_equal, restored, _state(3).optimizer)


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
  with saving.Saver(tmp_path, keep=1) as saver:
    _save(saver, 1)
  (tmp_path / 'checkpoints/1/manifest/data.json').write_text('{}')
  assert saving.newest_whole(tmp_path) is None
  with saving.Saver(tmp_path, keep=1) as saver:
    # Nothing is in its way.
    _save(saver, 1)
  assert saving.newest_whole(tmp_path) == 1


def test_a_step_that_came_without_sums_is_taken(tmp_path):
  with saving.Saver(tmp_path, keep=1) as saver:
    _save(saver, 1)
  file = tmp_path / 'checkpoints/1/manifest/data.json'
  said = json.loads(file.read_text())
  del said['sums'], said['digest']
  file.write_text(json.dumps(said))
  assert saving.newest_whole(tmp_path) == 1


def test_the_best_and_every_third_step_are_kept(tmp_path):
  kls = 0.5, 0.2, 0.4, None, 0.3, 0.25, 0.3, None
  # Two sessions: what the first knew of its steps is read from their folders.
  for steps in (range(4), range(4, 8)):
    with saving.Saver(tmp_path, keep=1, keep_best=1, keep_every=3) as saver:
      for step in steps:
        _save(saver, step, heldout_kl=kls[step])
  assert orbax_files.steps(tmp_path / saving.FOLDER) == [7, 6, 3, 1, 0]
