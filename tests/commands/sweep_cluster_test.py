"""Do submitit's jobs run our commands, and are its refusals one line?"""

import os
import shutil
import signal
import sys

import pytest

from gemma_qat import errors
from gemma_qat.commands import sweep_cluster
from gemma_qat.commands import sweep_jobs

pytest.importorskip('submitit')


def _run(
    tmp_path, executor, parameters, programs=('print("fine")',),
    on_wait=lambda names: None,
):
  jobs = [
      sweep_jobs.Job(f'p{i}', (sys.executable, '-c', p), tmp_path / f'{i}.txt')
      for i, p in enumerate(programs)
  ]
  with sweep_jobs.StopSignal() as stop:
    return jobs, dict(sweep_cluster.run(
        jobs, 0, stop, on_wait, executor, parameters,
        tmp_path / 'submitted',
    ))


@pytest.mark.parametrize('executor', ['local', 'debug'])
def test_jobs_run_and_their_exit_codes_come_back(tmp_path, executor):
  jobs, codes = _run(
      tmp_path, executor, {'timeout_min': 5},
      ('print("fine")', 'raise SystemExit(3)'),
  )
  assert codes == {'p0': 0, 'p1': 3}
  assert jobs[0].log.read_text().endswith('\nfine\n')


def test_a_stop_cancels_the_jobs_which_hear_of_it(tmp_path):
  program = (
      'import signal, sys, time\n'
      'signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved"))\n'
      'print("ready", flush=True)\n'
      'time.sleep(60)'
  )
  log = tmp_path / '0.txt'

  def on_wait(names):
    del names
    if log.exists() and log.read_text().endswith('\nready\n'):
      os.kill(os.getpid(), signal.SIGTERM)

  _, codes = _run(tmp_path, 'local', {}, (program,), on_wait)
  assert codes['p0'] != 0
  assert log.read_text().endswith('\nsaved\n')


@pytest.mark.parametrize('parameters', [
    {'timeout_mins': 5}, {'timeout_min': 'long'}, {'nodes': 2},
])
def test_a_parameter_that_submitit_refuses_is_said(tmp_path, parameters):
  with pytest.raises(errors.UserError, match='submitit says'):
    _run(tmp_path, 'local', parameters)


@pytest.mark.skipif(shutil.which('srun') is not None, reason='there is Slurm')
def test_slurm_where_there_is_none_is_said(tmp_path):
  with pytest.raises(errors.UserError, match='--executor=slurm: submitit says'):
    _run(tmp_path, 'slurm', {})


def test_options_are_names_and_values():
  assert sweep_cluster.options('timeout_min=60,slurm_partition=gpu') == {
      'timeout_min': 60, 'slurm_partition': 'gpu'
  }
  assert sweep_cluster.options('') == {}
  for text in ('timeout_min', '=3', 'a b=3'):
    with pytest.raises(errors.UserError, match='NAME=VALUE'):
      sweep_cluster.options(text)
