"""README: its map is the tree on disk, its result is the stored report."""

import json
import pathlib
import re

from gemma_qat import __main__ as cli
from gemma_qat.reporting import headline

_ROOT = pathlib.Path(__file__).parents[1]
_README = (_ROOT / 'README.md').read_text(encoding='utf-8')


def _map():
  section = _README.split('## The tree')[1].split('\n## ')[0]
  return re.findall(r'^    (\S+)  ', section, flags=re.MULTILINE)


def test_everything_on_the_map_exists():
  assert _map()
  for path in _map():
    assert (_ROOT / path).exists(), path
    assert (_ROOT / path).is_dir() == path.endswith('/'), path


def test_every_room_and_module_is_on_the_map():
  package = _ROOT / 'gemma_qat'
  expected = {
      f'gemma_qat/{p.name}{"/" if p.is_dir() else ""}'
      for p in package.iterdir()
      if not p.name.startswith('__')
  }
  assert expected == {p for p in _map() if p.startswith('gemma_qat/')}


def test_every_command_is_described():
  for command in cli.COMMANDS:
    assert f'`gemma-qat {command} ' in _README, command


def test_the_result_table_is_the_stored_report():
  report = json.loads(
      (_ROOT / headline.REPORT).read_text(encoding='utf-8')
  )
  assert headline.render(report) in _README
