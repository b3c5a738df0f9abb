"""Every notebook is clean, says where it runs, and runs on `tiny`."""

import ast
import configparser
import json
import os
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_FOLDER = _ROOT / 'notebooks'
NAMES = sorted(p.name for p in _FOLDER.glob('*.ipynb'))
# What replaces the parameters: one layer takes seconds less to compile.
_PARAMETERS = {
    '01_what_int4_does_to_a_weight.ipynb': lambda folder: {},
    '02_qat_of_your_own_checkpoint.ipynb': lambda folder: {'MODEL': folder},
    '03_reading_a_sweep.ipynb': lambda folder: {
        'SEEDS': [0, 1],
        'CHANGES': ['--config.data.train=readmes',
                    '--config.evaluation.chunks=2',
                    '--config.evaluation.jax_chunks=2',
                    f'--config.model.checkpoint={folder}'],
    },
    '04_planning_a_27b_run.ipynb': lambda folder: {'MODEL': folder},
}


def _cells(name, kind):
  notebook = json.loads((_FOLDER / name).read_text(encoding='utf-8'))
  return [c for c in notebook['cells'] if c['cell_type'] == kind]


def _programs(name):
  return [''.join(c['source']) for c in _cells(name, 'code')]


def _address():
  setup = configparser.ConfigParser()
  setup.read(_ROOT / 'setup.cfg', encoding='utf-8')
  return setup['metadata']['url']


def test_the_notebooks_are_those_that_are_run_here():
  assert NAMES == sorted(_PARAMETERS)


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_is_of_the_format_and_has_no_outputs(name):
  notebook = json.loads((_FOLDER / name).read_text(encoding='utf-8'))
  assert (notebook['nbformat'], notebook['nbformat_minor']) == (4, 5)
  assert notebook.keys() == {'cells', 'metadata', 'nbformat', 'nbformat_minor'}
  assert notebook['metadata']['kernelspec']['name'] == 'python3'
  ids = [cell['id'] for cell in notebook['cells']]
  assert len(set(ids)) == len(ids)
  for cell in notebook['cells']:
    assert cell['cell_type'] in ('code', 'markdown')
    assert all(isinstance(line, str) for line in cell['source'])
    assert isinstance(cell['metadata'], dict)
  for cell in _cells(name, 'code'):
    assert cell['outputs'] == [] and cell['execution_count'] is None
  for cell in _cells(name, 'markdown'):
    assert 'outputs' not in cell and 'execution_count' not in cell


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_opens_with_its_badge_and_installs(name):
  first = ''.join(_cells(name, 'markdown')[0]['source'])
  link = _address().replace(
      'https://github.com', 'https://colab.research.google.com/github'
  )
  assert first.startswith('# ')
  assert f'({link}/blob/main/notebooks/{name})' in first
  install, parameters, *_ = _programs(name)
  assert f"REPOSITORY = '{_address()}'" in install
  # One cell, written once.
  assert install == _programs(NAMES[0])[0]
  assert parameters.startswith('TINY = True')
  assert [c['metadata'].get('tags') for c in _cells(name, 'code')][:3] == [
      None, ['parameters'], None
  ]


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_defines_nothing_and_keeps_to_80_columns(name):
  for program in _programs(name):
    # No magic either: then this would be no Python.
    for node in ast.walk(ast.parse(program)):
      assert not isinstance(
          node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
      ), ast.unparse(node)
    assert max(map(len, program.splitlines())) <= 80


def test_the_readme_links_every_notebook():
  readme = (_ROOT / 'README.md').read_text(encoding='utf-8')
  for name in NAMES:
    assert f'(notebooks/{name})' in readme, name


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_runs_from_top_to_bottom(name, one_layer, tmp_path):
  figures, folder = tmp_path / 'figures', tmp_path / 'folder'
  figures.mkdir()
  folder.mkdir()
  done = subprocess.run(
      [sys.executable, _ROOT / 'tests' / 'run_notebook.py', _FOLDER / name,
       figures, json.dumps(_PARAMETERS[name](str(one_layer)))],
      cwd=folder, capture_output=True, text=True, timeout=600, check=False,
      env={
          **os.environ, 'MPLBACKEND': 'Agg', 'JAX_PLATFORMS': 'cpu',
          'PYTHONPATH': str(_ROOT),
          # A sweep's processes compile the same many small programs.
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      },
  )
  assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-4_000:]
  assert 1 <= len(list(figures.iterdir())) <= 4
