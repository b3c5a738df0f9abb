"""Processes side by side: their logs, exit codes, shares, and their end."""

import os
import signal
import sys
import time

import pytest

from gemma_qat import errors
from gemma_qat.commands import sweep_jobs


def _job(tmp_path, name, program):
  return sweep_jobs.Job(
      name, (sys.executable, '-c', program), tmp_path / name / 'log.txt'
  )


def _run(jobs, parallel, on_wait=lambda names: None):
  with sweep_jobs.StopSignal() as stop:
    return dict(sweep_jobs.run(jobs, parallel, stop, on_wait)), stop


def test_every_job_has_its_log_and_its_exit_code(tmp_path):
  jobs = [
      _job(tmp_path, 'good', 'print("fine")'),
      _job(tmp_path, 'bad', 'raise SystemExit("no good")'),
      _job(tmp_path, 'last', 'print("too")'),
  ]
  codes, _ = _run(jobs, 1)
  assert codes == {'good': 0, 'bad': 1, 'last': 0}
  read = lambda job: job.log.read_text(encoding='utf-8')
  # The command, then what it said.
  assert read(jobs[0]).startswith(f'$ {sys.executable} -c')
  assert read(jobs[0]).endswith('\nfine\n')
  assert 'no good' in read(jobs[1])
  _run(jobs[:1], 1)
  assert read(jobs[0]).count('\nfine\n') == 2


def test_as_many_run_at_a_time_as_was_asked(tmp_path):
  jobs = [_job(tmp_path, n, 'import time; time.sleep(0.5)') for n in 'abcd']
  seen = []
  codes, _ = _run(jobs, 2, lambda names: seen.append(len(names)))
  assert len(codes) == 4 and max(seen) == 2


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='Linux alone')
def test_jobs_at_a_time_share_the_cpus(tmp_path):
  program = (
      'import os, time; time.sleep(0.3); print(sorted(os.sched_getaffinity(0)))'
  )
  jobs = [_job(tmp_path, n, program) for n in 'ab']
  _run(jobs, 2)
  said = [j.log.read_text().split('\n')[-2] for j in jobs]
  mine = sorted(os.sched_getaffinity(0))
  expected = sweep_jobs.shares(mine, 2)
  assert said == [str(list(share)) for share in expected]
  # Alone, a job has all of them.
  _run(jobs[:1], 2)
  assert jobs[0].log.read_text().split('\n')[-2] == str(mine)


def test_shares_are_whole_and_none_is_empty():
  assert sweep_jobs.shares(range(8), 2) == [(0, 1, 2, 3), (4, 5, 6, 7)]
  assert sweep_jobs.shares(range(7), 3) == [(0, 1), (2, 3), (4, 5, 6)]
  assert sweep_jobs.shares('ab', 3) == [('a',), ('b',), ('a',)]


def test_gpus_are_shared_and_never_shared_twice(tmp_path, monkeypatch):
  program = 'import os; print(os.environ["CUDA_VISIBLE_DEVICES"])'
  jobs = [_job(tmp_path, n, program) for n in 'ab']
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,3,5')
  _run(jobs, 2)
  assert [j.log.read_text().split('\n')[-2] for j in jobs] == ['2', '3,5']
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2')
  with pytest.raises(errors.UserError, match='--parallel=1'):
    _run(jobs, 2)


def test_a_stop_reaches_what_runs_and_begins_nothing_more(tmp_path):
  program = (
      'import signal, sys, time\n'
      'signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n'
      'print("ready", flush=True)\n'
      'time.sleep(60)'
  )
  jobs = [_job(tmp_path, n, program) for n in ('first', 'second')]
  asked = []

  def on_wait(names):
    if not asked and 'ready' in jobs[0].log.read_text().split('\n'):
      asked.append(names)
      os.kill(os.getpid(), signal.SIGTERM)

  start = time.monotonic()
  codes, stop = _run(jobs, 1, on_wait)
  assert codes == {'first': 75} and stop.asked == 1
  assert time.monotonic() - start < 30
  assert not jobs[1].log.exists()


def test_the_second_ctrl_c_ends_what_does_not_stop(tmp_path):
  # As the loop: the first signal is a request, the next has its usual effect.
  program = (
      'import signal, time\n'
      'def ask(*_):\n'
      '  print("asked", flush=True)\n'
      '  signal.signal(signal.SIGTERM, signal.SIG_DFL)\n'
      'signal.signal(signal.SIGTERM, ask)\n'
      'print("ready", flush=True)\n'
      'for _ in range(600): time.sleep(0.1)'
  )
  job = _job(tmp_path, 'a', program)

  def on_wait(names):
    del names
    if job.log.read_text().split('\n')[-2] in ('ready', 'asked'):
      os.kill(os.getpid(), signal.SIGINT)

  codes, _ = _run([job], 1, on_wait)
  assert codes == {'a': -signal.SIGTERM}
