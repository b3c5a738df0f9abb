"""A workdir belongs to the run that began it."""

import json
import subprocess
import sys

import pytest

from experiments.configs import base
from gemma_qat import errors
from gemma_qat.training import workdir as workdir_lib


def _config(**changes):
  config = base.get_config('tiny').unlock()
  config.train.update(changes)
  return config.lock()


def test_a_new_folder_gets_the_resolved_config_and_the_revision(tmp_path):
  folder = tmp_path / 'runs' / 'a'
  workdir_lib.claim(folder, _config())
  config = json.loads((folder / workdir_lib.CONFIG).read_text())
  assert config['train']['steps'] == 8
  assert config['quant']['rules'][1] == ['^embedding$', 'q8_0']
  revision = json.loads((folder / workdir_lib.REVISION).read_text())
  assert {'git', 'jax', 'device'} <= revision.keys()


@pytest.mark.parametrize('package', ['no-such-package-anywhere', ''])
def test_a_package_that_is_missing_is_called_so(package):
  assert workdir_lib.version(package) == 'not installed'
  assert workdir_lib.version('jax')[0].isdigit()


def test_the_same_config_may_go_on(tmp_path):
  workdir_lib.claim(tmp_path, _config())
  before = (tmp_path / workdir_lib.REVISION).read_bytes()
  workdir_lib.claim(tmp_path, _config())
  assert (tmp_path / workdir_lib.REVISION).read_bytes() == before


def test_another_config_is_refused_and_the_difference_named(tmp_path):
  workdir_lib.claim(tmp_path, _config())
  with pytest.raises(
      errors.UserError, match='train.length was 64, now 128 and 1 more'
  ):
    workdir_lib.claim(tmp_path, _config(steps=9, length=128))


@pytest.mark.parametrize('content', ['{"train": ', '[' * 100_000])
def test_a_damaged_config_is_refused(tmp_path, content):
  (tmp_path / workdir_lib.CONFIG).write_text(content)
  with pytest.raises(errors.UserError, match='cannot be used'):
    workdir_lib.claim(tmp_path, _config())


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
  (tmp_path / 'x').write_text('')
  with pytest.raises(errors.UserError, match='choose another'):
    workdir_lib.claim(tmp_path / 'x', _config())


def test_whether_a_run_began_is_found_out_without_a_trace(tmp_path):
  folder = tmp_path / 'new'
  assert not workdir_lib.is_begun(folder, _config())
  assert not folder.exists()
  workdir_lib.claim(folder, _config())
  assert workdir_lib.is_begun(folder, _config())
  with pytest.raises(errors.UserError, match='another config'):
    workdir_lib.is_begun(folder, _config(steps=9))


HOLDER = '''
import pathlib, sys
from gemma_qat.training import workdir
with workdir.hold(pathlib.Path(sys.argv[1]), 'train'):
  print('held', flush=True)
  sys.stdin.read()
'''


def test_a_process_that_holds_a_workdir_keeps_others_out_until_it_dies(
    tmp_path
):
  holder = subprocess.Popen(
      [sys.executable, '-c', HOLDER, str(tmp_path)], text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE,
  )
  try:
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(
        errors.UserError, match=f'in use by process {holder.pid} on'
    ):
      with workdir_lib.hold(tmp_path, 'train'):
        pass
    with workdir_lib.hold(tmp_path, 'export'):
      pass
  finally:
    holder.kill()
    holder.communicate()
  with workdir_lib.hold(tmp_path, 'train'):
    pass
