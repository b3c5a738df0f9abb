"""Which claims hold? Runs every benchmark and writes a table of them.

  make bench                          # the CPU's, at their small sizes
  python -m benchmarks.run_all --on=gpu --torch_python=PATH
  python -m benchmarks.run_all --list     # the table of benchmarks/README.md

Results go to experiments/results/benchmarks.jsonl and from there to
benchmarks.md beside it; what is not run now keeps what was measured before.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
from typing import Iterable, Mapping, NamedTuple

_ROOT = pathlib.Path(__file__).parents[1]
_RESULTS = _ROOT / 'experiments' / 'results'
_LONGEST = 3600
_TORCH = '--torch_python=$TORCH_PYTHON'


class Benchmark(NamedTuple):
  """A claim, the file that measures it, its arguments and goals.

  cpu and gpu are arguments, None where there is nothing to run; a goal bounds
  the ratio, '<= 1.10' or '>= 1.5', or is empty.
  """

  claim: str
  file: str
  cpu: str | None
  gpu: str | None
  cpu_goal: str = ''
  gpu_goal: str = ''

  def command(self, on: str) -> str | None:
    """Returns the command on 'cpu' or 'gpu', None where there is none."""
    arguments = getattr(self, on)
    if arguments is None:
      return None
    return f'python -m benchmarks.{self.file} {arguments}'.rstrip()


# Recomputing all but products leaves room for two programs' states in 80 GB.
_WHOLE = '--size=1b --layers=0 --vocabulary=0 --length=1024 --remat=products'
_HEAD = '--width=2560 --vocabulary=262144 --dtype=bfloat16'
BENCHMARKS = (
    Benchmark(
        'QAT costs a step next to nothing: derived', 'qat_tax',
        '--mode=derived', f'--mode=derived {_WHOLE} --tokens=8192',
        '<= 1.10', '<= 1.03',
    ),
    Benchmark(
        'the same: learned', 'qat_tax',
        '--mode=learned', f'--mode=learned {_WHOLE} --tokens=8192',
        '<= 1.10', '<= 1.03',
    ),
    Benchmark(
        'the same: codes', 'qat_tax',
        '--mode=codes', f'--mode=codes {_WHOLE} --tokens=8192',
        '<= 1.10', '<= 1.03',
    ),
    Benchmark(
        'KL over the vocabulary: its products and little else', 'linear_kl',
        '--against=products',
        f'--against=products {_HEAD} --tokens=32768', '', '<= 1.25',
    ),
    Benchmark(
        'the same, trained head', 'linear_kl',
        '--against=products --train_head',
        f'--against=products --train_head {_HEAD} --tokens=32768',
    ),
    Benchmark(
        'KL over the vocabulary: faster than logits', 'linear_kl',
        '--against=logits', f'--against=logits {_HEAD} --tokens=4096',
    ),
    Benchmark(
        'the same, trained head', 'linear_kl',
        '--against=logits --train_head',
        f'--against=logits --train_head {_HEAD} --tokens=4096',
    ),
    Benchmark(
        'a local layer costs its window', 'attention', '--length=2048',
        '--length=32768 --window=1024 --heads=16 --kv_heads=8 '
        '--dtype=bfloat16 --implementation=cudnn --against=blockwise',
    ),
    Benchmark(
        'a global layer costs half the square', 'attention',
        '--length=2048 --window=0', None,
    ),
    Benchmark(
        'fsdp sends codes, not weights', 'fsdp_gather', '', None,
    ),
    Benchmark(
        'texts at once against one by one', 'batch_sampling', '', None,
    ),
    Benchmark(
        'a step against plain JAX', 'plain_step',
        '', f'{_WHOLE} --tokens=4096',
    ),
    Benchmark(
        'tokens/s against PyTorch and torchao', 'pytorch_step',
        _TORCH,
        f'{_TORCH} {_WHOLE} --tokens=8192 --dtype=bfloat16 --chunk=1024 '
        '--torch_compile',
        '', '>= 1.5',
    ),
)


def main(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--on', default='cpu', choices=('cpu', 'gpu'))
  parser.add_argument('--only', default='', help='files, divided by commas')
  parser.add_argument('--torch_python', help='a Python that has torch')
  parser.add_argument('--list', action='store_true')
  parser.add_argument('--results', type=pathlib.Path, default=_RESULTS)
  a = parser.parse_args(argv)
  if a.list:
    print(render_list(BENCHMARKS))
    return
  store = a.results / 'benchmarks.jsonl'
  outcomes = read(store)
  for benchmark in BENCHMARKS:
    command = benchmark.command(a.on)
    if command is None or (a.only and benchmark.file not in a.only.split(',')):
      continue
    if _TORCH in command and not a.torch_python:
      continue
    print(command, file=sys.stderr, flush=True)
    outcomes[command] = outcome = run(command, a.torch_python)
    print(json.dumps(outcome), file=sys.stderr, flush=True)
    store.write_text(''.join(
        json.dumps({'command': c, **o}) + '\n' for c, o in outcomes.items()
    ), encoding='utf-8')
  path = a.results / 'benchmarks.md'
  path.write_text(render(BENCHMARKS, outcomes), encoding='utf-8')
  print(path)


def run(command: str, torch_python: str | None = None) -> dict:
  """Runs one command; returns its line, or {'failed': why}."""
  words = shlex.split(command.replace('$TORCH_PYTHON', torch_python or ''))
  try:
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=_ROOT, capture_output=True,
        text=True, timeout=_LONGEST,
    )
  except subprocess.TimeoutExpired:
    return {'failed': f'more than {_LONGEST} s'}
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ['nothing was said'])[-1]
    return {'failed': f'exit {done.returncode}: {last[:200]}'}
  try:
    return json.loads(done.stdout.strip().splitlines()[-1])
  except (IndexError, json.JSONDecodeError):
    return {'failed': f'no line of JSON: {done.stdout[-200:]!r}'}


def read(path: pathlib.Path) -> dict[str, dict]:
  """Returns what was measured before: command -> outcome."""
  if not path.is_file():
    return {}
  lines = map(json.loads, path.read_text(encoding='utf-8').splitlines())
  return {line.pop('command'): line for line in lines}


def render(
    benchmarks: Iterable[Benchmark], outcomes: Mapping[str, dict]
) -> str:
  """Makes the table; a row without an outcome says 'not measured'."""
  rows = []
  for on in ('cpu', 'gpu'):
    for b in benchmarks:
      command = b.command(on)
      if command is not None:
        goal = getattr(b, f'{on}_goal')
        rows.append(_row(b, on, command, goal, outcomes.get(command)))
  return '\n'.join((
      '# Benchmarks',
      '',
      'Written by `make bench` (`benchmarks/run_all.py`). Ours and other are',
      'medians, measured in turn in one run; the ratio is the median over the',
      'rounds, their range in brackets; on a CPU also of processor time, which',
      'other work on the machine disturbs less. Temporaries are those of the',
      'compiled programs, beside arguments and results.',
      '',
      _line('claim', 'shapes', 'device', 'ours', 'other', 'ratio',
            'of processor time', 'goal', 'temporaries, GB'),
      _line(*['---'] * 3, *['---:'] * 4, '---', '---:'),
      *rows,
      '',
  ))


def render_list(benchmarks: Iterable[Benchmark]) -> str:
  """Makes the table of benchmarks/README.md."""
  code = lambda command: f'`{command}`' if command else '-'
  return '\n'.join((
      _line('file', 'claim', 'on a CPU', 'on a GPU', 'goal: CPU, GPU'),
      _line(*['---'] * 5),
      *(
          _line(f'`{b.file}.py`', b.claim, code(b.command('cpu')),
                code(b.command('gpu')),
                f'{b.cpu_goal or "-"}, {b.gpu_goal or "-"}')
          for b in benchmarks
      ),
  ))


def is_met(goal: str, ratio: float) -> bool:
  """Whether a ratio keeps to '<= x' or '>= x'."""
  sign, bound = goal.split()
  return ratio <= float(bound) if sign == '<=' else ratio >= float(bound)


def _row(b, on, command, goal, outcome):
  if outcome is None:
    return _line(b.claim, f'not measured: `{command}`', on.upper(),
                 *[''] * 4, goal, '')
  if 'failed' in outcome:
    why = ' '.join(outcome['failed'].split()).replace('|', '\\|')
    return _line(b.claim, f'failed: `{command}`: {why}', on.upper(),
                 *[''] * 4, goal, '')
  o = outcome
  ratio = f'{o["ratio"]:.3g}'
  if 'ratio_range' in o:
    ratio += ' ({:.3g}-{:.3g})'.format(*o['ratio_range'])
  if goal:
    goal += ': met' if is_met(goal, o['ratio']) else ': missed'
  temporaries = ' / '.join(
      f'{o[key]:.3g}'
      for key in ('ours_temporary_gb', 'other_temporary_gb') if key in o
  )
  return _line(
      b.claim, o['shapes'], o['device'], f'{o["ours"]:.4g} {o["unit"]}',
      f'{o["other"]:.4g} {o["unit"]}', ratio,
      f'{o["cpu_ratio"]:.3g}' if 'cpu_ratio' in o else '', goal, temporaries,
  )


def _line(*cells):
  return f'| {" | ".join(cells)} |'


if __name__ == '__main__':
  main()
