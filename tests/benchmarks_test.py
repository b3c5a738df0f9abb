"""Every benchmark runs and prints its line; the collector loses no row."""

import importlib.util
import json
import math
import pathlib
import re
import sys

import pytest

from benchmarks import batch_sampling
from benchmarks import linear_kl
from benchmarks import measure
from benchmarks import plain_step
from benchmarks import pytorch_step
from benchmarks import qat_tax
from benchmarks import run_all

_ROOT = pathlib.Path(__file__).parents[1]
_TORCH = 'torch', 'torchao', 'transformers'
_SIZES = ['--repeats=2', '--dtype=float32']
_TINY = [*_SIZES, '--size=tiny', '--layers=1', '--vocabulary=0',
         '--tokens=32', '--length=16']
_HEAD = [*_SIZES, '--tokens=8', '--width=32', '--vocabulary=96', '--block=32']


def _line(main, flags, capsys):
  main(flags)
  (text,) = capsys.readouterr().out.splitlines()
  line = json.loads(text)
  assert line.keys() >= set(measure.KEYS)
  for key in ('ours', 'other', 'ratio'):
    assert math.isfinite(line[key]) and line[key] > 0, key
  return line


@pytest.mark.parametrize('head', [[], ['--train_head']], ids=str)
@pytest.mark.parametrize('against', ['products', 'logits'])
def test_linear_kl_prints_its_line(against, head, capsys):
  flags = [*_HEAD, f'--against={against}', *head]
  line = _line(linear_kl.main, flags, capsys)
  assert line['ours_temporary_gb'] > 0 and line['other_temporary_gb'] > 0


def test_qat_tax_prints_its_line(capsys):
  line = _line(qat_tax.main, [*_TINY, '--mode=codes'], capsys)
  assert line['shapes'].startswith('tiny, 1 layers, V 512, 2 x 16 tokens')


def test_plain_step_prints_its_line(capsys):
  line = _line(plain_step.main, [*_TINY, '--mode=derived'], capsys)
  assert line['unit'] == 's'


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, _TORCH)),
    reason=f'not all of {", ".join(_TORCH)} are installed here',
)
def test_pytorch_step_prints_its_line(capsys):
  flags = [*_TINY, f'--torch_python={sys.executable}', '--chunk=16']
  line = _line(pytorch_step.main, flags, capsys)
  # Seven linear modules a layer.
  assert line['other_built']['fake_quantized'] == 7


def test_batch_sampling_prints_its_line(capsys):
  line = _line(batch_sampling.main, _TINY, capsys)
  assert line['unit'] == 'tokens/s'


def test_the_ratio_is_that_of_ours_to_other():
  calls = []
  timed = measure.interleave(
      lambda: calls.append('ours'), lambda: calls.append('other'), 3
  )
  assert calls == ['ours', 'other'] * 4
  assert timed['ratio_range'][0] <= timed['ratio'] <= timed['ratio_range'][1]
  rates = measure.as_rates(
      {'ours': 2.0, 'other': 4.0, 'ratio': 0.5, 'ratio_range': [0.4, 0.8]},
      8, 'tokens/s',
  )
  assert (rates['ours'], rates['other'], rates['ratio']) == (4.0, 2.0, 2.0)
  assert rates['ratio_range'] == [1.25, 2.5]


def test_every_benchmark_of_the_list_exists_and_is_in_the_readme():
  for benchmark in run_all.BENCHMARKS:
    assert (_ROOT / 'benchmarks' / f'{benchmark.file}.py').is_file()
  readme = (_ROOT / 'benchmarks' / 'README.md').read_text(encoding='utf-8')
  assert run_all.render_list(run_all.BENCHMARKS) in readme


def test_a_row_that_fails_or_was_not_measured_says_so():
  good = {'shapes': 'S', 'device': 'D', 'ours': 1.0, 'other': 2.0,
          'ratio': 0.5, 'unit': 's'}
  rows = (
      run_all.Benchmark('first', 'linear_kl', '', '--x', '<= 0.4', '<= 1.0'),
      run_all.Benchmark('second', 'no_such_file', '', None),
  )
  bad = run_all.run(rows[1].command('cpu'))
  assert 'no_such_file' in bad['failed']
  text = run_all.render(rows, {
      rows[0].command('cpu'): good, rows[1].command('cpu'): bad
  })
  lines = [l for l in text.splitlines() if re.match(r'\| (first|second)', l)]
  assert len(lines) == 3
  assert '0.5 |  | <= 0.4: missed' in lines[0]
  assert '| failed: ' in lines[1]
  assert 'not measured: `python -m benchmarks.linear_kl --x`' in lines[2]


def test_what_is_not_run_keeps_what_was_measured(tmp_path):
  """A file of results goes through the driver, nothing being run."""
  command = run_all.BENCHMARKS[0].command('gpu')
  line = {'command': command, 'shapes': 'S', 'device': 'some GPU', 'ours': 1.0,
          'other': 1.0, 'ratio': 1.0, 'unit': 's'}
  (tmp_path / 'benchmarks.jsonl').write_text(json.dumps(line) + '\n')
  run_all.main([f'--results={tmp_path}', '--only=none'])
  text = (tmp_path / 'benchmarks.md').read_text()
  assert '| S | some GPU | 1 s | 1 s | 1 |  | <= 1.03: met |' in text
