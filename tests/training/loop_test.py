"""A run ends where its config says, however often it was stopped."""

import dataclasses
import os
import shutil

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from experiments.configs import base
from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import export
from gemma_qat.checkpoints import huggingface_out
from gemma_qat.checkpoints import orbax_files
from gemma_qat.quant import formats
from gemma_qat.training import loop
from gemma_qat.training import metrics
from gemma_qat.training import speed
from gemma_qat.training import workdir as workdir_lib
from tests import terminating


@pytest.fixture(scope='module')
def tiny_config(text, one_layer):
  """The tiny base config on that checkpoint and text, not locked."""
  config = base.get_config('tiny').unlock()
  config.model.checkpoint = str(one_layer)
  config.data.train = f'files:{text}/train*.txt'
  config.data.heldout_fraction = 0.3
  config.evaluation.text = f'files:{text}/held*.txt'
  return config


@pytest.fixture(scope='module')
def make_config(tiny_config):
  """Configs that start and compile sooner: make_config(steps=8 ...)."""
  def make(**train):
    config = tiny_config.copy_and_resolve_references()
    config.quant.start = 'reference'
    config.quant.modes = ((r'.', 'codes'),)
    config.train.rules = (
        (r'^embedding', None), (r'/scale$', 'scales'), (r'norm$', 'norms'),
    )
    config.train.length = 32
    config.train.update(train)
    return config.lock()
  return make


@pytest.fixture(scope='module')
def config(make_config):
  # The step after 5, where the second half goes on, is not logged.
  return make_config(
      steps=8, checkpoint_every=5, log_every=4, evaluate_every=8
  )


@pytest.fixture(scope='module')
def finished(config, tmp_path_factory):
  """Workdir of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp('runs') / 'finished'
  assert loop.train(config, workdir) == 8
  return workdir


def _arrays(workdir, step):
  folder = (workdir / 'checkpoints' / str(step)).resolve()
  return {
      f'{tree}/{path}': np.asarray(leaf)
      for tree in ('student', 'optimizer')
      for path, leaf in traverse_util.flatten_dict(
          orbax_files.load_tree(folder, tree), sep='/'
      ).items()
  }


def _assert_same_numbers(workdir, other, step):
  expected, found = _arrays(other, step), _arrays(workdir, step)
  assert found.keys() == expected.keys()
  for path, array in expected.items():
    np.testing.assert_array_equal(found[path], array, err_msg=path)
  # All but the speed.
  rows, expected = (
      [{k: v for k, v in row.items() if k not in speed.NAMES}
       for row in metrics.read(w)]
      for w in (workdir, other)
  )
  assert rows == expected


def test_the_tiny_config_writes_what_a_run_writes(
    tiny_config, one_layer, tmp_path
):
  assert loop.train(tiny_config.lock(), tmp_path) == 8
  rows = metrics.read(tmp_path)
  assert [row['step'] for row in rows] == [0, 2, 4, 6, 8]
  heldout = [r['heldout_kl_nats'] for r in rows if 'heldout_kl_nats' in r]
  assert len(heldout) == 3 and 0 < heldout[-1] < heldout[0] < 1
  assert {p.name for p in tmp_path.iterdir()} >= {
      'config.json', 'revision.json', 'metrics.jsonl', 'events', 'checkpoints'
  }
  student, teacher = detect.load(tmp_path), detect.load(one_layer)
  assert student.metadata['step'] == 8
  for name, number_format in [
      ('layer_0/attn_q', 'q4_0'), ('layer_0/mlp_down', 'q4_0'),
      ('embedding', 'q8_0'),
  ]:
    assert student.weights.entries[name].format == number_format
    values = checkpoints.to_float32(student.weights[name])
    error = np.linalg.norm(values - teacher.weights[name])
    assert error < 0.15 * np.linalg.norm(teacher.weights[name])


def test_rules_can_tell_layers_apart_where_none_is_stacked(
    make_config, tmp_path
):
  tiny = detect.load('random:tiny')
  two = dataclasses.replace(
      tiny,
      config=dataclasses.replace(
          tiny.config, variant='custom', num_layers=2, pattern=1
      ),
      weights=checkpoints.from_arrays({
          n: tiny.weights[n] for n in tiny.weights
          if '/' not in n or n.startswith(('layer_0/', 'layer_1/'))
      }),
  )
  huggingface_out.save(tmp_path / 'two', two, 'float32')
  config = make_config(
      steps=4, checkpoint_every=4, log_every=4, evaluate_every=4
  ).unlock()
  config.model.checkpoint = str(tmp_path / 'two')
  config.model.scan_layers = False
  config.quant.start = 'gptq'
  config.quant.rules = (
      (r'tail/layer_1/mlp_down$', 'q8_0'), (r'^embedding$', 'q4_0'),
      *config.quant.rules[:-1],
  )
  loop.train(config.lock(), tmp_path / 'run')
  trained = detect.load(tmp_path / 'run')
  kinds = {n: e.format for n, e in trained.weights.entries.items()}
  assert kinds['layer_0/mlp_down'] == 'q4_0'
  assert kinds['layer_1/mlp_down'] == 'q8_0'
  assert kinds['embedding'] == 'q4_0'
  for name, most in [
      ('layer_0/mlp_down', 0.25), ('layer_1/mlp_down', 0.01),
      ('layer_1/attn_q', 0.25), ('embedding', 0.25),
  ]:
    lost = checkpoints.to_float32(trained.weights[name]) - two.weights[name]
    assert np.linalg.norm(lost) < most * np.linalg.norm(two.weights[name])


def test_bf16_safe_scales_stay_so_in_training_and_in_every_file(
    make_config, tmp_path
):
  config = make_config(
      steps=4, checkpoint_every=4, log_every=4, evaluate_every=4
  ).unlock()
  config.quant.bf16_safe_scales = True
  config.quant.modes = ((r'mlp_up$', 'learned'), (r'.', 'codes'))
  config.train.rules = (*config.train.rules, (r'/master$', 'weights'))
  loop.train(config.lock(), tmp_path / 'run')
  trained = detect.load(tmp_path / 'run')
  export.export(trained, tmp_path / 'file.gguf')
  step = orbax_files.find_step(tmp_path / 'run')
  raw = orbax_files.load_tree(step, 'student')
  raw = np.asarray(raw['tail']['layer_0']['attn_q']['scale'])
  assert np.any(raw != _bfloat16(raw))
  reloaded = detect.load(tmp_path / 'file.gguf')
  matrices = [n for n, e in trained.weights.entries.items()
              if e.format == 'q4_0']
  assert len(matrices) == 7
  for name in matrices:
    weight, again = trained.weights[name], reloaded.weights[name]
    assert weight.format == again.format == 'q4_0'
    jax.tree.map(
        np.testing.assert_array_equal, again.quantized, weight.quantized
    )
    scale = weight.quantized.scale
    np.testing.assert_array_equal(_bfloat16(scale), scale)
    np.testing.assert_array_equal(scale.astype(np.float16), scale)
    if not name.endswith('mlp_up'):
      # All that a reader of bfloat16 values needs: codes did not move.
      values = _bfloat16(checkpoints.to_float32(weight))
      anew = formats.get('q4_0').quantize(jnp.asarray(values))
      jax.tree.map(np.testing.assert_array_equal, anew, weight.quantized)


def _bfloat16(x):
  return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def test_a_killed_run_goes_on_from_its_last_checkpoint_bit_for_bit(
    config, finished, tmp_path
):
  workdir = tmp_path / 'killed'
  shutil.copytree(finished, workdir)
  # As if killed in step 8, with a row half written.
  shutil.rmtree(workdir / 'checkpoints' / '8')
  with open(workdir / metrics.FILE, 'a', encoding='utf-8') as f:
    f.write('{"step": 8, "kl')
  assert loop.train(config, workdir) == 8
  _assert_same_numbers(workdir, finished, 8)


@pytest.fixture(scope='module')
def resting(make_config):
  """Masters move in three steps of six, then scales and norms alone."""
  config = make_config(
      steps=6, checkpoint_every=1, log_every=2, evaluate_every=3, keep=9,
      freeze_codes=0.5,
  ).unlock()
  config.quant.modes = (
      (r'mlp_up$', 'learned'), (r'mlp_gate$', 'lora4'), (r'.', 'codes')
  )
  config.train.rules = (
      *config.train.rules, (r'mlp_up/master$', 'weights'),
      (r'/lora_[ab]$', 'factors'),
  )
  config.optimizer.learning_rate = 0.05
  config.optimizer.average = 0.8
  config.optimizer.dampening = 1e-4
  config.loss.terms = (('jensen_shannon', 0.9), ('cross_entropy', 0.1))
  return config.lock()


@pytest.fixture(scope='module')
def rested(resting, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'rested'
  assert loop.train(resting, workdir) == 6
  return workdir


def _codes(workdir, step):
  weights = detect.load(workdir / 'checkpoints' / str(step)).weights
  return np.concatenate([
      np.ravel(weights[n].quantized.codes)
      for n, e in weights.entries.items() if e.format == 'q4_0'
  ])


def test_frozen_codes_rest_and_their_scales_go_on(rested):
  assert (_codes(rested, 1) != _codes(rested, 2)).any()
  # The running mean decides at which codes they rest.
  assert (_codes(rested, 3) != _codes(rested, 4)).any()
  for step in (5, 6):
    np.testing.assert_array_equal(_codes(rested, step), _codes(rested, 4))
  scales = [
      _arrays(rested, step)['student/tail/layer_0/attn_q/scale']
      for step in (4, 5)
  ]
  assert (scales[0] != scales[1]).all()


def test_what_moves_and_what_is_kept_is_in_the_metrics(rested):
  rows = {row['step']: row for row in metrics.read(rested)}
  assert 0 < rows[2]['flipped_codes'] < 0.2
  assert 'flipped_codes' not in rows[4] | rows[6]
  assert rows[2]['loss'] != rows[2]['kl_nats'] > 0
  # Evaluated as it was, and as its mean, which the checkpoint holds.
  assert rows[6]['heldout_kl_nats_of_last'] != rows[6]['heldout_kl_nats']


@pytest.mark.parametrize('last', [2, 3, 4])
def test_a_run_stopped_around_the_freezing_goes_on_bit_for_bit(
    resting, rested, last, tmp_path
):
  workdir = tmp_path / 'stopped'
  shutil.copytree(rested, workdir)
  for step in range(last + 1, 7):
    shutil.rmtree(workdir / 'checkpoints' / str(step))
  assert loop.train(resting, workdir) == 6
  _assert_same_numbers(workdir, rested, 6)


@pytest.mark.parametrize('changes, words', [
    ({'train.freeze_codes': 0.2}, 'config.train.freeze_codes is about codes'),
    ({'optimizer.dampening': 0.2}, 'config.optimizer.dampening is about codes'),
    ({'loss.terms': (('hidden', 1.0),)}, 'says nothing of the probabilities'),
    ({'loss.terms': (('kld', 1.0),)}, "'kld' is not one of forward_kl"),
    ({'optimizer.average': 1.5}, 'average=1.5'),
])
def test_what_cannot_work_is_refused_with_the_reason(
    make_config, tmp_path, changes, words
):
  config = make_config()
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError, match=words):
    loop.train(config, tmp_path)


def test_freezing_all_that_is_trained_is_refused(make_config, tmp_path):
  config = make_config(freeze_codes=0.5, steps=4).unlock()
  config.quant.modes = ((r'^embedding$', 'codes'), (r'.', 'derived'))
  config.train.rules = ((r'mlp_up$', 'weights'), (r'.', None))
  with pytest.raises(errors.UserError, match='leaves nothing to train in'):
    loop.train(config.lock(), tmp_path)


def test_a_finished_run_stays_as_it_is(config, finished):
  before = _arrays(finished, 8), metrics.read(finished)
  assert loop.train(config, finished) == 8
  after = _arrays(finished, 8), metrics.read(finished)
  jax.tree.map(np.testing.assert_array_equal, after, before)


def test_sigterm_saves_the_step_under_way_and_stops(make_config, tmp_path):
  steps = 100_000
  config = make_config(
      steps=steps, checkpoint_every=steps, log_every=1, evaluate_every=steps
  )
  is_third = lambda: any(r['step'] >= 3 for r in metrics.read(tmp_path))
  with terminating.terminated_when(is_third):
    with pytest.raises(errors.Stopped, match='Stopped after step'):
      loop.train(config, tmp_path)
  rows = [row['step'] for row in metrics.read(tmp_path)]
  # What the start was is kept as well.
  saved, start = orbax_files.steps(tmp_path / 'checkpoints')
  assert rows == list(range(saved + 1)) and saved >= 3 and start == 0


def test_a_workdir_of_another_config_is_refused(make_config, finished):
  with pytest.raises(errors.UserError, match='train.keep was 3, now 2'):
    loop.train(
        make_config(steps=8, checkpoint_every=5, log_every=4, evaluate_every=8,
                    keep=2),
        finished,
    )


def test_steps_without_finite_numbers_in_a_row_end_the_run(
    make_config, tmp_path, capsys
):
  config = make_config(
      steps=9, checkpoint_every=9, evaluate_every=9, log_every=9,
      most_skipped=2,
  ).unlock()
  config.optimizer.learning_rate = 1e30
  with pytest.raises(errors.UserError, match=(
      r'Step (\d) on batch \1 was skipped: .* That makes 2 in a row '
      r'\(config.train.most_skipped=2\): lower config.optimizer.learning'
  )):
    loop.train(config.lock(), tmp_path)
  assert '1 skipped so far' in capsys.readouterr().err
  # A start that is whole, and rows that are JSON.
  assert orbax_files.steps(tmp_path / 'checkpoints') == [0]
  assert all(np.isfinite(list(r.values())).all() for r in metrics.read(tmp_path))


def test_a_damaged_checkpoint_is_passed_over_and_written_anew(
    config, finished, tmp_path, capsys
):
  shutil.copytree(finished, tmp_path / 'copy')
  saved = tmp_path / 'copy' / 'checkpoints'
  largest = max(
      (p for p in (saved / '8').rglob('*') if p.is_file()),
      key=lambda p: p.stat().st_size,
  )
  contents = bytearray(largest.read_bytes())
  contents[len(contents) // 2] ^= 1
  largest.write_bytes(contents)
  assert loop.train(config, tmp_path / 'copy') == 8
  said = capsys.readouterr().err
  assert '/8 is damaged' in said or '8/' in said and 'is damaged' in said
  assert 'moved to' in said and 'Going on at step 5.' in said
  assert (tmp_path / 'copy' / 'damaged' / '8').is_dir()
  _assert_same_numbers(tmp_path / 'copy', finished, 8)


def test_the_best_checkpoint_stays_beside_the_newest(make_config, tmp_path):
  config = make_config(
      steps=6, checkpoint_every=1, evaluate_every=6, log_every=6, keep=1,
      keep_every=4,
  ).unlock()
  # Best at the start, then it only gets worse.
  config.optimizer.learning_rate = 0.3
  loop.train(config.lock(), tmp_path)
  rows = [r for r in metrics.read(tmp_path) if r['step']]
  best = min(rows, key=lambda r: r['heldout_kl_nats'])['step']
  kept = orbax_files.steps(tmp_path / 'checkpoints')
  assert sorted(kept) == sorted({0, best, 4, 6})


def test_a_workdir_in_use_is_refused(config, finished):
  with workdir_lib.hold(finished, 'train'):
    with pytest.raises(errors.UserError, match=(
        rf'in use by process {os.getpid()} on '
    )):
      loop.train(config, finished)


def test_less_held_out_text_than_a_batch_is_refused(make_config, tmp_path):
  config = make_config(batch_size=4096)
  with pytest.raises(errors.UserError, match='fewer than one batch of 4096'):
    loop.train(config, tmp_path)


def test_a_batch_that_does_not_split_over_the_mesh_is_refused_early(tmp_path):
  config = base.get_config('tiny').unlock()
  config.train.batch_size = 6
  with pytest.raises(errors.UserError, match='batch_size.*8 equal parts'):
    loop.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'tokens').exists()


def test_a_run_can_start_from_the_file_of_another(
    make_config, finished, tmp_path
):
  export.export(detect.load(finished), tmp_path / 'first.gguf')
  config = make_config(steps=2, checkpoint_every=1, evaluate_every=2).unlock()
  config.quant.start = str(tmp_path / 'first.gguf')
  # Twice, for the second step alone takes a rate of 0.
  config.optimizer.warmup_steps = 1
  loop.train(config.lock(), tmp_path / 'second')
  before = [r['heldout_kl_nats'] for r in metrics.read(finished)
            if 'heldout_kl_nats' in r]
  after = metrics.read(tmp_path / 'second')
  # The files' float32 gains are those that were trained, plus and minus one.
  assert after[0]['heldout_kl_nats'] == pytest.approx(before[-1], rel=1e-4)
  np.testing.assert_array_equal(
      _codes(tmp_path / 'second', 2), _codes(finished, 8)
  )


def test_a_start_in_other_formats_is_refused(
    make_config, finished, tmp_path
):
  config = make_config().unlock()
  config.quant.start = str(finished)
  config.quant.rules = (('mlp_up$', 'q8_0'), *config.quant.rules)
  with pytest.raises(errors.UserError, match='mlp_up as q4_0, but.*q8_0'):
    loop.train(config.lock(), tmp_path)
