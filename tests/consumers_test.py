"""The consumers' driver runs what needs none of them, and keeps clean texts."""

import pathlib
import re
import subprocess
import sys

import gguf
import numpy as np
import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_DRIVER = _ROOT / 'experiments' / 'consumers' / 'check.py'


@pytest.fixture(scope='module')
def session():
  sys.path.insert(0, str(_DRIVER.parent))
  try:
    import session  # pylint: disable=g-import-not-at-top
    yield session
  finally:
    sys.path.remove(str(_DRIVER.parent))


@pytest.fixture(scope='module')
def gguf_diff(session):
  import gguf_diff  # pylint: disable=g-import-not-at-top
  return gguf_diff


@pytest.fixture
def record(session, tmp_path):
  return session.Record(session.Session(
      work=tmp_path / 'stage', venvs={'mlx': tmp_path / 'venv'},
      llama_cpp=tmp_path / 'llama', model=None, bf16_safe=None,
  ))


def _check(tmp_path, *flags):
  return subprocess.run(
      [sys.executable, _DRIVER, f'--work={tmp_path}/work',
       f'--results={tmp_path}/results', f'--venvs={tmp_path}/venvs', *flags],
      capture_output=True, text=True, cwd=_ROOT,
      env={'PYTHONPATH': str(_ROOT), 'PATH': '', 'JAX_PLATFORMS': 'cpu'},
  )


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  path = tmp_path_factory.mktemp('tiny') / 'model.gguf'
  subprocess.run(
      [sys.executable, '-m', 'gemma_qat', 'quantize', '--from=random:tiny',
       f'--to={path}', '--format=q4_0'], check=True, cwd=_ROOT,
  )
  return path


def test_a_stage_that_needs_no_consumer_runs_and_is_summed_up(tiny, tmp_path):
  done = _check(tmp_path, '--only=ollama', f'--model={tiny}')
  assert done.returncode == 0, done.stderr
  summary = (tmp_path / 'results' / 'consumers.md').read_text()
  rows = [l for l in summary.splitlines() if l.startswith('| Ollama')]
  assert len(rows) == 3 and all(row.endswith('| yes |') for row in rows)
  kept = (tmp_path / 'results' / 'consumers' / 'ollama.txt').read_text()
  assert 'FROM ./model.gguf' in kept
  assert str(tmp_path) not in kept + summary


def test_consumers_that_are_not_there_are_left_out(tmp_path):
  done = _check(tmp_path, '--only=mlx,mtmd', '--model=random:tiny')
  assert done.returncode == 0
  assert 'mlx: left out, there is no environment' in done.stderr
  assert not list(tmp_path.rglob('*.txt'))


def test_an_unknown_stage_is_refused(tmp_path):
  done = _check(tmp_path, '--only=mlx,nothing')
  assert done.returncode == 2 and 'no stage nothing' in done.stderr


def test_what_is_kept_has_no_paths_of_the_machine(record, tmp_path):
  assert record.clean(
      f'$ {tmp_path}/venv/bin/python {tmp_path}/stage/a/b.npy {tmp_path}/else/x.so'
  ) == '$ python[mlx] a/b.npy x.so'
  assert record.clean('0.01.102.856 W load: 3.5 tokens/s') == (
      'load: 3.5 tokens/s'
  )


def test_rows_come_back_from_a_stages_file(record, session, tmp_path):
  record.add('mlx-lm 1', 'MLX', 'logits are ours', '48 of 48', True)
  record.say(*(f'line {i}' for i in range(200)))
  record.write(tmp_path / 'mlx.txt')
  assert session.read_rows(tmp_path / 'mlx.txt') == record.rows
  text = (tmp_path / 'mlx.txt').read_text()
  assert '[... 160 lines]' in text and 'line 199' in text


def test_a_program_that_fails_is_told_with_its_last_words(record):
  with pytest.raises(RuntimeError, match='ended with 3'):
    record.run([sys.executable, '-c', 'print("Oh"); raise SystemExit(3)'])


def test_differences_of_files_are_found_and_judged(gguf_diff, tmp_path):
  for name, bos, last in (('a', 2, 1.0), ('b', 1, 2.0)):
    writer = gguf.GGUFWriter(tmp_path / name, 'gemma3')
    writer.add_name(name)
    writer.add_bos_token_id(bos)
    writer.add_tensor('same', np.zeros(4, np.float32))
    writer.add_tensor('other', np.array([1, 1, last], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
  lines, unexplained = gguf_diff.compare(tmp_path / 'a', tmp_path / 'b')
  assert unexplained == 2
  assert [re.match('[^:]+', line)[0] for line in lines[:-1]] == [
      'general.name', 'tokenizer.ggml.bos_token_id', 'other',
  ]
  assert gguf_diff.blocks(tmp_path / 'a', tmp_path / 'b', 'F32', 4) == (1, 7)
