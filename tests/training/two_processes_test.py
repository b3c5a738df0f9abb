"""Two processes are one run: the same losses, a checkpoint that both wrote."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.configs import base
from gemma_qat.training import loop
from gemma_qat.training import metrics
from gemma_qat.training import speed

_CHANGES = (
    '--config.quant.start=reference',
    "--config.quant.modes=((r'.', 'codes'),)",
    "--config.train.rules=((r'^embedding', None), (r'/scale$', 'scales'), "
    "(r'norm$', 'norms'))",
    '--config.train.length=32',
)


def _start(workdir, text, checkpoint, port, process, *more):
  environment = dict(os.environ, JAX_PLATFORMS='cpu')
  environment['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'
  return subprocess.Popen(
      [
          sys.executable, '-m', 'gemma_qat', 'train',
          '--config=experiments/configs/base.py:tiny', *_CHANGES,
          f'--config.model.checkpoint={checkpoint}',
          f'--config.data.train=files:{text}/train*.txt',
          '--config.data.heldout_fraction=0.3',
          f'--config.evaluation.text=files:{text}/held*.txt',
          '--config.mesh.fsdp=2', '--config.mesh.gather=codes', *more,
          f'--workdir={workdir}', f'--coordinator=127.0.0.1:{port}',
          '--num_processes=2', f'--process_id={process}',
      ],
      env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
      text=True,
  )


def _free_port():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


@pytest.fixture(scope='module')
def by_two(text, one_layer, tmp_path_factory):
  """Workdir of a run by two processes of two devices each, and what they said.
  """
  workdir = tmp_path_factory.mktemp('runs') / 'two'
  port = _free_port()
  processes = [_start(workdir, text, one_layer, port, i) for i in (0, 1)]
  said = [p.communicate(timeout=600) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], said
  return workdir, said


def _config(text, checkpoint):
  """The same run, for one process; the mesh may be another."""
  config = base.get_config('tiny').unlock()
  config.model.checkpoint = str(checkpoint)
  config.quant.start = 'reference'
  config.quant.modes = ((r'.', 'codes'),)
  config.train.rules = (
      (r'^embedding', None), (r'/scale$', 'scales'), (r'norm$', 'norms'),
  )
  config.train.length = 32
  config.data.train = f'files:{text}/train*.txt'
  config.data.heldout_fraction = 0.3
  config.evaluation.text = f'files:{text}/held*.txt'
  return config.lock()


def _assert_near(workdir, expected):
  rows, expected = metrics.read(workdir), metrics.read(expected)
  assert [r['step'] for r in rows] == [r['step'] for r in expected]
  for row, other in zip(rows, expected, strict=True):
    for name in row.keys() - set(speed.NAMES):
      assert row[name] == pytest.approx(other[name], rel=2e-3, abs=1e-5), name


def test_only_the_first_of_two_reports(by_two):
  workdir, said = by_two
  (first, _), (second, _) = said
  assert 'Step 8 lies in' in first and 'Step' not in second
  assert len(list((workdir / 'events').iterdir())) == 1
  assert json.loads((workdir / 'config.json').read_text())['mesh']['fsdp'] == 2


def test_two_processes_have_the_losses_of_one(
    by_two, text, one_layer, tmp_path
):
  config = _config(text, one_layer)
  loop.train(config, tmp_path / 'one')
  _assert_near(by_two[0], tmp_path / 'one')


def test_what_two_wrote_one_restores_on_another_mesh(
    by_two, text, one_layer, tmp_path
):
  workdir = tmp_path / 'again'
  shutil.copytree(by_two[0], workdir)
  shutil.rmtree(workdir / 'checkpoints' / '8')
  config = _config(text, one_layer).unlock()
  config.mesh.tensor = 2
  assert loop.train(config.lock(), workdir) == 8
  _assert_near(workdir, by_two[0])
  assert (workdir / 'checkpoints' / '8').is_dir()
  assert np.isfinite(metrics.read(workdir)[-1]['heldout_kl_nats'])


@pytest.mark.parametrize('victim', [0, 1])
def test_a_process_whose_peer_was_killed_ends_and_both_go_on(
    text, one_layer, tmp_path, victim
):
  def start():
    port = _free_port()
    return [
        _start(
            tmp_path, text, one_layer, port, i, '--config.train.steps=80',
            '--config.train.log_every=1', '--config.train.checkpoint_every=20',
            '--config.train.evaluate_every=80',
        ) for i in (0, 1)
    ]

  processes = start()
  deadline = time.monotonic() + 400
  while len(metrics.read(tmp_path)) < 6:
    assert time.monotonic() < deadline, 'no step in 400 s'
    assert all(p.poll() is None for p in processes)
    time.sleep(0.05)
  processes[victim].kill()
  processes[victim].communicate()
  # The connection that closes tells at once; at the worst, JAX's patience of a
  # minute and its farewell of another.
  _, said = processes[1 - victim].communicate(timeout=150)
  if processes[1 - victim].returncode == 2:
    assert 'Another process of this job is gone' in said.splitlines()[-1]
  else:
    # A collective that was not told: JAX itself ends it after its minute.
    assert 'distributed service' in said and 'another task died' in said, said
  if victim == 0:
    return  # The same as below.
  processes = start()
  said = [p.communicate(timeout=600) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], said
  steps = [row['step'] for row in metrics.read(tmp_path)]
  assert steps == list(range(81))
