"""A sweep, small: stopped, gone on with, one point of it failing."""

import contextlib
import io
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from gemma_qat import __main__ as cli
from gemma_qat.training import workdir as workdirs

# A checkpoint a step makes the steps slow enough to be stopped in between.
_CONFIG = '''
from experiments.configs import gemma3_270m_cpu

def get_config(variant=''):
  c = gemma3_270m_cpu.get_config(variant).unlock()
  c.train.steps = 12
  c.train.checkpoint_every = c.train.log_every = 1
  return c.lock()

def sweep(add):
  add('seed0')
  add('broken', {'quant.rules': (('attention', 'q4_0'),)})
  add('seed1', seed=1)
'''


def _say(arguments):
  """(exit code, stdout, stderr) of one command in this process."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = cli.main(arguments)
  return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope='module')
def arguments(tmp_path_factory, texts, one_layer):
  folder = tmp_path_factory.mktemp('sweep')
  (folder / 'points.py').write_text(_CONFIG, encoding='utf-8')
  return [
      'sweep', f'--config={folder / "points.py"}:tiny',
      f'--workdir={folder / "points"}', *texts,
      f'--config.model.checkpoint={one_layer}',
  ]


@pytest.fixture(scope='module')
def workdir(arguments):
  return next(
      pathlib.Path(a.split('=')[1]) for a in arguments
      if a.startswith('--workdir')
  )


@pytest.fixture(scope='module')
def stopped(arguments, workdir):
  """(exit code, stderr, list) of a sweep that gets SIGTERM while it trains."""
  process = subprocess.Popen(
      [sys.executable, '-m', 'gemma_qat', *arguments], text=True,
      stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
  )
  rows = workdir / 'seed0' / 'metrics.jsonl'
  end = time.monotonic() + 300
  while process.poll() is None and time.monotonic() < end:
    if rows.exists() and 'kl_nats": ' in rows.read_text().split('\n')[-2:][0]:
      process.send_signal(signal.SIGTERM)
      break
    time.sleep(0.02)
  _, err = process.communicate(timeout=120)
  return process.returncode, err, _say([*arguments, '--list'])[1]


@pytest.fixture(scope='module')
def gone_on(arguments, stopped):
  """(exit code, stdout, stderr) of the same command, once more."""
  del stopped
  return _say([*arguments, '--parallel=2'])


def test_a_stopped_sweep_says_so_and_where_its_points_are(stopped):
  code, err, listed = stopped
  assert code == 75
  assert 'the same command goes on' in err
  assert 'Traceback' not in err
  assert 'seed0' in listed and 'stopped at step' in listed
  assert listed.count('not begun') == 2
  # What is changed, and the index for a job array.
  assert 'quant.rules=[["attention", "q4_0"]]' in listed
  assert listed.split('\n')[-2].split()[:3] == ['2', 'seed1', 'seed=1']


def test_the_stopped_point_went_on_and_lost_no_step(gone_on, workdir):
  del gone_on
  log = (workdir / 'seed0' / 'log.txt').read_text()
  assert 'Going on at step' in log
  rows = [
      json.loads(x) for x in (workdir / 'seed0' / 'metrics.jsonl').open()
  ]
  assert [r['step'] for r in rows] == list(range(13))


def test_one_failing_point_does_not_end_the_others(gone_on, workdir):
  code, out, err = gone_on
  assert code == 1
  for name in ('seed0', 'seed1'):
    assert (workdir / name / 'report.json').is_file()
    assert f'{name}: held-out KL ' in out and 'won back' in out
  assert 'broken: failed with exit code 2' in out
  table = out[out.index(' point '):]
  assert [x.split()[:2] for x in table.strip().split('\n')[2:]] == [
      ['seed0', 'finished'], ['broken', 'failed,'], ['seed1', 'finished']
  ]
  last = err.strip().split('\n')[-1]
  # Why, and where to look.
  assert 'broken' in last and "'attention'" in last
  assert str(workdir / 'broken' / 'log.txt') in last


def test_a_cluster_s_jobs_do_the_same(gone_on, arguments):
  pytest.importorskip('submitit')
  del gone_on
  code, out, err = _say([*arguments, '--only=broken', '--executor=local'])
  assert code == 1
  assert 'Submitted: broken as ' in out
  assert 'broken: failed with exit code 2' in out
  assert "'attention'" in err.strip().split('\n')[-1]


def test_finished_points_are_not_run_again(gone_on, arguments, workdir):
  del gone_on
  files = [workdir / n / 'log.txt' for n in ('seed0', 'seed1')]
  before = [f.read_bytes() for f in files]
  code, out, _ = _say([*arguments, '--only=seed1,seed0'])
  assert code == 0
  assert [f.read_bytes() for f in files] == before
  assert out.count('finished') == 2 and 'broken' not in out


def test_a_point_begun_with_another_config_is_refused(
    gone_on, arguments, workdir
):
  del gone_on
  before = (workdir / 'seed0' / 'report.json').read_bytes()
  code, out, err = _say([
      *arguments, '--only=seed0', '--config.optimizer.learning_rate=1.0'
  ])
  assert code == 1 and 'refused' in out
  assert 'another config' in err and 'optimizer.learning_rate' in err
  assert f'remove {workdir / "seed0"}' in err
  assert (workdir / 'seed0' / 'report.json').read_bytes() == before


def test_a_point_at_work_is_not_begun_twice(arguments, workdir, tmp_path):
  del workdir
  held = tmp_path / 'seed1'
  with workdirs.hold(held, 'run'):
    code, _, err = _say([*arguments, f'--workdir={tmp_path}', '--point=2'])
  assert code == 2
  assert str(held) in err and 'in use by process' in err


def test_the_report_sets_the_points_side_by_side(gone_on, workdir, tmp_path):
  del gone_on
  code, out, _ = _say(['report', str(workdir)])
  assert code == 0 and 'not finished: 1' in out
  text = (workdir / 'report.md').read_text(encoding='utf-8')
  # Two seeds are one row with a deviation.
  row = next(x for x in text.split('\n') if x.startswith('| seed '))
  assert '| 2 |' in row and ' ± ' in row
  assert '| broken |' in text and 'no step yet' in text
  page = (workdir / 'report.html').read_text(encoding='utf-8')
  assert page.count('data:image/png;base64,') == 2
  for name in ('heldout.png', 'size.png'):
    assert (workdir / name).stat().st_size
  # The report is no point of the sweep; another place takes it, too.
  assert _say(['report', str(workdir), f'--to={tmp_path / "to"}'])[0] == 0


@pytest.mark.parametrize('flags, word', [
    (['--only=seed7'], 'seed7'), (['--point=3'], '--point=3'),
    (['--parallel=0'], '--parallel=0'), (['--distributed'], '--point'),
    (['--cluster_options=timeout_min=3'], '--executor'),
    (['--executor=local', '--cluster_options=x'], 'NAME=VALUE'),
    (['--config.seed=3'], 'seed1 change'),
])
def test_flags_that_make_no_sense_are_one_line(
    arguments, tmp_path, flags, word
):
  code, _, err = _say([*arguments, f'--workdir={tmp_path / "w"}', *flags])
  assert code == 2 and word in err
  assert len(err.strip().split('\n')) == 1
  assert not (tmp_path / 'w').exists()
