"""No damaged file gets more than a clear refusal; nothing is unpickled.

A short run of experiments/fuzz, without guidance, in a process of its own: an
audit hook stays for good, and a reader that crashes takes its process along.
"""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.fuzz import inputs
from experiments.fuzz import ocdbt

_ROOT = pathlib.Path(__file__).parents[1]
_SECONDS = 300
# Orbax is slow: fewer of those in the same time.
_INPUTS = {
    'configs,text,tokenizer_model,stored_tokenizer,tokenizer_json': 400,
    'gguf,huggingface,sbs': 300,
    'orbax,orbax_resumed,google': 30,
}
_FORBIDDEN = {
    '_pickle', 'cloudpickle', 'dill', 'jinja2', 'joblib', 'marshal', 'pickle',
    'shelve', 'torch',
}


def _python(*arguments, **kwargs):
  return subprocess.run(
      [sys.executable, *arguments], cwd=_ROOT, capture_output=True, text=True,
      timeout=_SECONDS, check=False, **kwargs,
  )


@pytest.mark.parametrize('readers', list(_INPUTS))
def test_damaged_files_are_read_or_refused(readers, tmp_path):
  (tmp_path / 'scratch').mkdir()
  done = _python(
      '-m', 'experiments.fuzz.child', f'--reader={readers}',
      f'--inputs={_INPUTS[readers]}', f'--folder={tmp_path / "found"}',
      f'--scratch={tmp_path / "scratch"}',
  )
  assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
  found = (tmp_path / 'found').rglob('findings/*')
  assert not [path.read_text('utf-8', 'replace') for path in found]


_BAD = """
import ctypes, os, pathlib, subprocess, sys
from experiments.fuzz import guard
pathlib.Path(sys.argv[1], 'damaged').mkdir()
home, libc = pathlib.Path(sys.argv[1]), ctypes.CDLL(None)
watch = guard.Guard([sys.prefix, sys.base_prefix, '<frozen'], [home])
def write(): open(home / 'x', 'w').close()
def write_natively():
  libc.close(libc.creat(os.fsencode(home / 'y'), 0o600))
def write_into_the_input():
  libc.close(libc.creat(os.fsencode(home / 'damaged' / 'z'), 0o600))
def start(): subprocess.run(['true'])
def run_text(): eval(b'1 + 1')
def remember(): bytearray(b'x') * (2**30 + 2**26)
def load(): __import__('smtplib')
def nothing(): open(home / 'x').close(), json.loads('[1]')
import json
for what in (write, write_natively, write_into_the_input, start, run_text,
             remember, load, nothing):
  watch.begin(b'module: smtplib', home / 'damaged')
  what()
  seen, _ = watch.end()
  print(json.dumps([what.__name__, sorted({s.split(':')[0] for s in seen})]))
"""


def test_the_guard_sees_what_no_reader_may_do(tmp_path):
  done = _python('-c', _BAD, str(tmp_path))
  seen = dict(map(json.loads, done.stdout.splitlines()))
  assert set(seen.pop('write')) >= {'open', 'file'}, done.stderr
  assert seen.pop('write_natively') == ['file']
  assert seen.pop('write_into_the_input') == ['file']
  assert 'subprocess.Popen' in seen.pop('start')
  assert set(seen.pop('run_text')) == {'compile', 'exec'}
  assert seen.pop('remember') == ['memory']
  assert 'import' in seen.pop('load')
  assert seen == {'nothing': []}


@pytest.mark.parametrize('bad', [
    'raise KeyError(path)', 'os.abort()', 'time.sleep(1000)',
    'return bytearray(2**31)',
])
def test_findings_are_kept_whatever_becomes_of_the_process(bad, tmp_path):
  """A reader with a mistake in it, in place of one that has none."""
  script = tmp_path / 'bad.py'
  script.write_text(
      'import os, sys, time\n'
      'from absl import app, flags\n'
      'from experiments.fuzz import child, targets\n'
      'child.LONGEST_SECONDS = 2\n'
      'def read(path):\n'
      f'  if path.read_bytes() != b"valid": {bad}\n'
      'targets.TARGETS["bad"] = targets.Target(\n'
      '    lambda folder: (folder / "x").write_bytes(b"valid"), read)\n'
      'if __name__ == "__main__": app.run(child.main)\n'
  )
  driver = (
      'import pathlib, sys\n'
      'from absl import flags\n'
      'from experiments.fuzz import __main__ as fuzz, child\n'
      'flags.FLAGS(["x"])\n'
      'child.LONGEST_SECONDS = 2\n'
      'fuzz.CHILD = [sys.argv[1]]\n'
      'total = fuzz.fuzz("bad", pathlib.Path(sys.argv[2]), 3, 60, False)\n'
      'assert total.inputs == 3, total\n'
      'assert total.findings == 1, total\n'
  )
  folder = tmp_path / 'found' / 'bad'
  done = _python(
      '-c', driver, str(script), str(folder),
      env=os.environ | {'PYTHONPATH': str(_ROOT)},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  kept, text = sorted((folder / 'findings').iterdir())
  assert text.name == f'{kept.name}.txt' and len(kept.read_bytes()) >= 2


def test_the_stored_table_is_that_of_the_stored_numbers():
  done = _python('-c', (
      'from experiments.fuzz import __main__ as fuzz\n'
      'found = fuzz.stored()\n'
      'assert [t.reader for t in found] == list(fuzz.READERS)\n'
      'assert all(t.inputs > 0 and not t.findings for t in found)\n'
      'print(fuzz.render(found), end="")\n'
  ))
  table = _ROOT / 'experiments' / 'results' / 'fuzz.md'
  assert done.stdout == table.read_text(encoding='utf-8'), done.stderr


def test_inputs_damage_one_file_and_the_folder_heals(tmp_path):
  (tmp_path / 'a.json').write_text('{"a": 1}')
  (tmp_path / 'b.bin').write_bytes(b'four')
  folder = inputs.Folder(tmp_path)
  assert folder.seeds() == [b'\0\0{"a": 1}', b'\1\0four']
  for what in range(256):
    with folder.damaged(bytes([1, what]) + b'other') as path:
      assert path.name == 'b.bin'
      assert (tmp_path / 'a.json').read_text() == '{"a": 1}'
      if what < 240:
        assert path.read_bytes() == b'other'
    assert (tmp_path / 'b.bin').read_bytes() == b'four'


def test_the_checksum_is_castagnolis():
  # The check value of the catalogue of parametrised CRC algorithms.
  assert ocdbt.crc32c(b'123456789') == 0xE3069283


def test_nothing_is_unpickled_and_no_text_is_run():
  paths = sorted((_ROOT / 'gemma_qat').rglob('*.py'))
  assert len(paths) > 100
  for path in paths:
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      assert not _is_dangerous(node), f'{path}, line {node.lineno}'


@pytest.mark.parametrize('line', [
    'import pickle', 'import os, dill as d', 'from torch import load',
    'import jinja2.sandbox', 'np.load(f, allow_pickle=True)', 'eval(text)',
    'np.load(f, allow_pickle=is_trusted)', 'run(c, shell=True)',
])
def test_what_could_run_code_is_noticed(line):
  assert any(map(_is_dangerous, ast.walk(ast.parse(line))))


def _is_dangerous(node):
  """Whether it reads pickles, renders templates or runs a text."""
  names = []
  if isinstance(node, ast.Import):
    names = [alias.name for alias in node.names]
  elif isinstance(node, ast.ImportFrom):
    names = [node.module or '']
  elif isinstance(node, ast.keyword) and node.arg in (
      'allow_pickle', 'trust_remote_code', 'shell'
  ):
    return not (
        isinstance(node.value, ast.Constant) and node.value.value is False
    )
  elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
    return node.func.id in ('eval', 'exec', 'compile')
  return any(name.split('.')[0] in _FORBIDDEN for name in names)
