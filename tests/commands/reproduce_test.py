"""A finished run comes out the same again, and what differs is named."""

import json
import re
import shutil

import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from gemma_qat import __main__ as cli
from gemma_qat.checkpoints import orbax_files
from gemma_qat.commands import config_flags
from gemma_qat.commands import reproduce
from gemma_qat.commands import run
from gemma_qat.training import loop
from gemma_qat.training import metrics
from gemma_qat.training import workdir as workdirs
from tests import terminating
from tests.commands import conftest


@pytest.fixture(scope='module')
def repeated(finished, tmp_path_factory):
  """Workdir of the repetition of `finished`, kept by --to; the exit code."""
  to = tmp_path_factory.mktemp('repetition') / 'to'
  return to, cli.main(['reproduce', str(finished[0]), f'--to={to}'])


@pytest.fixture
def copy(finished, tmp_path):
  """The finished run in a folder whose files may be changed."""
  shutil.copytree(finished[0], tmp_path / 'run', symlinks=True)
  return tmp_path / 'run'


def test_the_same_config_gives_the_same_bytes(finished, repeated, capsys):
  to, code = repeated
  assert code == 0
  found = reproduce.compare(finished[0], to)
  assert list(found) == [
      'checkpoint of step 8', 'metrics.jsonl', run.QAT, run.PTQ, run.BASE,
      'report.json',
  ]
  assert all(is_same for is_same, _ in found.values()), found
  # Once more it is only compared, and the sums of both are said.
  before = (to / 'report.json').stat().st_mtime_ns
  assert cli.main(['reproduce', str(finished[0]), f'--to={to}']) == 0
  out = capsys.readouterr().out
  sums = re.findall(r'sha256 (\w{64}) (was|now)', out)
  assert len(sums) == 6 and sums[0][0] == sums[1][0]
  assert f'bit for bit. The repetition lies in {to}' in out
  assert (to / 'report.json').stat().st_mtime_ns == before


def test_a_changed_array_is_found_and_named(repeated, copy):
  step = copy / 'checkpoints' / '8'
  tree = orbax_files.load_tree(step, 'student')
  name = next(n for n in tree if n.endswith('norm'))
  tree[name] = tree[name].copy()
  tree[name].reshape(-1)[:2] += np.float32(0.25)
  with orbax_files.context():
    ocp.save_checkpointables(copy / 'changed', {'student': tree})
  shutil.rmtree(step / 'student')
  (copy / 'changed' / 'student').rename(step / 'student')
  found = reproduce.compare(copy, repeated[0])
  assert [n for n, v in found.items() if not v.is_same] == [
      'checkpoint of step 8'
  ]
  # That the step is not as it was saved tells damage from chance.
  assert 'is damaged' in found['checkpoint of step 8'].said
  assert re.search(
      rf'student/{name}: 2 of \d+ values differ, by 0.25 at most; 1 of ',
      found['checkpoint of step 8'].said,
  )


def test_everything_else_that_differs_is_said_and_kept(
    repeated, copy, capsys
):
  rows = metrics.read(copy)
  rows[-1]['kl_nats'] += 1e-9
  (copy / 'metrics.jsonl').write_text(
      ''.join(json.dumps(r) + '\n' for r in rows)
  )
  data = bytearray((copy / run.QAT).read_bytes())
  data[-1] ^= 1
  (copy / run.QAT).write_bytes(data)
  report = json.loads((copy / 'report.json').read_text())
  report['kld']['qat'] *= 2
  (copy / 'report.json').write_text(json.dumps(report))
  (copy / 'revision.json').write_text(json.dumps(
      json.loads((copy / 'revision.json').read_text()) | {'jax': '0.0.1'}
  ))
  to = copy.with_name('run.reproduced')
  shutil.copytree(repeated[0], to)
  assert cli.main(['reproduce', str(copy)]) == 1
  out, err = capsys.readouterr()
  assert 'checkpoint of step 8: the same' in out
  assert re.search(r'metrics.jsonl: DIFFERENT: row \d \(step 8\): kl_nats', out)
  assert f'{run.QAT}: DIFFERENT' in out and f'{run.PTQ}: the same' in out
  assert 'report.json: DIFFERENT: kld.qat was' in out
  assert f'lies in {to}' in out and to.is_dir()
  assert 'jax was 0.0.1, now ' in err
  # The same once the files are as they were.
  shutil.copytree(repeated[0], copy, dirs_exist_ok=True)
  assert cli.main(['reproduce', str(copy)]) == 0
  assert not to.exists()


def test_training_alone_goes_on_where_it_was_stopped(
    texts, one_layer, tmp_path, capsys
):
  # A checkpoint a step makes the steps slow enough to be stopped in between.
  config = config_flags.load(f'{conftest.CONFIG}:tiny', [
      *texts, f'--config.model.checkpoint={one_layer}',
      '--config.train.checkpoint_every=1', '--config.train.log_every=1',
  ])
  loop.train(config, tmp_path / 'train')
  to = tmp_path / 'train.reproduced'
  command = ['reproduce', str(tmp_path / 'train')]
  with terminating.terminated_when(lambda: len(metrics.read(to)) > 2):
    assert cli.main(command) == 75
  assert 'the same command goes on' in capsys.readouterr().err
  assert to.is_dir()
  assert cli.main(command) == 0
  out, err = capsys.readouterr()
  assert 'Going on at step' in err
  assert 'checkpoint of step 8: the same' in out and 'gguf' not in out
  assert 'was removed' in out and not to.exists()


def _refuses(argv, capsys, *words):
  assert cli.main([str(a) for a in argv]) == 2
  said = capsys.readouterr().err.strip().split('\n')
  assert len(said) == 1, said
  for word in words:
    assert word in said[0], said[0]


def test_what_is_no_finished_run_is_refused(copy, tmp_path, capsys):
  _refuses(['reproduce', tmp_path], capsys, 'holds no run')
  (copy / 'report.json').unlink()
  _refuses(['reproduce', copy], capsys, 'not finished', 'no report.json')
  shutil.rmtree(copy / 'checkpoints' / '8')
  _refuses(['reproduce', copy], capsys, 'not finished', 'of 8')
  (copy / workdirs.CONFIG).write_text('{"name": ')
  _refuses(['reproduce', copy], capsys, workdirs.CONFIG, 'damaged')


def test_a_folder_that_is_not_the_repetition_s_is_refused(
    copy, repeated, tmp_path, capsys
):
  _refuses(['reproduce', copy, f'--to={copy}'], capsys, 'the run itself')
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'letter').write_text('x')
  _refuses(['reproduce', copy, f'--to={tmp_path / "mine"}'], capsys, 'no run')
  config = json.loads((copy / workdirs.CONFIG).read_text())
  config['seed'] = 7
  (copy / workdirs.CONFIG).write_text(json.dumps(config))
  _refuses(['reproduce', copy, f'--to={repeated[0]}'], capsys, 'seed was 0')
  other = tmp_path / 'other'
  shutil.copytree(copy, other)
  revision = json.loads((other / workdirs.REVISION).read_text())
  (other / workdirs.REVISION).write_text(json.dumps(revision | {'git': 'abc'}))
  _refuses(['reproduce', copy, f'--to={other}'], capsys, 'git was abc')


def test_other_devices_than_the_run_had_are_refused(copy, capsys):
  path = copy / workdirs.REVISION
  path.write_text(json.dumps(json.loads(path.read_text()) | {'devices': 2}))
  _refuses(['reproduce', copy], capsys, 'had 2 devices, here are 8')
