"""The lowest versions are those that setup.cfg says, and no others."""

import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[1]


def _say(path):
  return subprocess.run(
      [sys.executable, str(_ROOT / '.ci' / 'lowest.py'), str(path)],
      capture_output=True, text=True, check=False,
  )


def test_every_requirement_gets_its_lowest_version():
  found = _say(_ROOT / 'setup.cfg').stdout.split()
  said = (_ROOT / 'setup.cfg').read_text(encoding='utf-8')
  assert 'jax==0.10' in found and 'pytest==8.0' in found
  # Extras for one kind of machine are not installed with the tests.
  assert not any(line.startswith('datasets') for line in found)
  for line in found:
    name, _, version = line.partition('==')
    assert f'    {name}>={version}\n' in said or f'    {line}\n' in said


@pytest.mark.parametrize('line', ['jax', 'jax>=0.10,<0.11', 'jax[cuda]>=0.1'])
def test_a_requirement_without_a_lowest_version_is_named(tmp_path, line):
  path = tmp_path / 'setup.cfg'
  path.write_text(
      f'[options]\ninstall_requires =\n    {line}\n'
      '[options.extras_require]\ntest =\n    pytest>=8.0\n'
  )
  found = _say(path)
  assert found.returncode == 1 and repr(line) in found.stderr
