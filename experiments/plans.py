"""Plans every slice that the configs name, and sets the table of all of them.

  python experiments/plans.py [--only=27b] [--again]

Writes experiments/results/plans.md and, a row each, plans/*.json. A row that is
there is kept unless --again; each is compiled by a process of its own, one
after the other: minutes a row on an idle CPU, up to 8 GB of memory.
"""

import argparse
import importlib
import json
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = ('270m', '1b', '4b', '12b', '12b_scales', '27b')
# Rows beside those of the configs' DEVICES: (size, variant, name, changes).
EXTRA = (
    ('4b', 'h100-1', 'int8', ('--config.optimizer.moments=int8',)),
    ('4b', 'h100-1', 'int8-in-parts', (
        '--config.optimizer.moments=int8', '--config.train.accumulate=8')),
    ('4b', 'h100-1', 'adafactor', ('--config.optimizer.name=adafactor',)),
    ('27b', 'v5p-2x2x4', 'codes', ('--config.mesh.gather=codes',)),
    ('27b', 'h100-8', 'bfloat16', ('--config.optimizer.moments=bfloat16',)),
)
INTRODUCTION = '''Made by `python experiments/plans.py`: the training step of
`experiments/configs/gemma3_SIZE.py`, compiled ahead of time for devices that
were not there. Nothing here was run.'''
NOTES = (
    'weights, optimizer, teacher: what a device holds of the arguments, exact. '
    'temporaries: the rest of what the compiler asks for (activations, '
    'gradients, gathered weights, padding, on TPUs the program).',
    'left over: of the memory that a program can have (TPUs: as libtpu says; '
    "GPUs: as the driver shows). The compiler's refusal stands in the JSON.",
    'libtpu rows: compiled for the very slice. XLA:CPU rows: compiled for as '
    'many simulated devices, before whose own passes the partitioned program '
    'was read; their temporaries are those of a CPU, which computes some of '
    'bfloat16 in float32, layer by layer: a stand-in for what a GPU will want.',
    'GB sent: by a device to others in a step, if every collective is a ring; '
    'loops counted as often as they run. links s: that at the published '
    'bandwidth of all links together.',
    'TFLOP: products of the compiled program, recomputation and masked '
    'attention included; MFU counts what the model asks for alone '
    '(`gemma_qat/model/flops.py`).',
    'at best: the longest of products, memory traffic (TPUs) and links, each '
    'at its published peak and all at once: a bound, no forecast. MFU that '
    'others have reached: 49.7 % on eight H100 (MaxText, Llama 2 7B), 65 to '
    '71 % on v5p.',
    "estimated: the compiler's cycles for all but collectives, which it does "
    'not estimate, at the published clock; then the links, as if nothing '
    'overlapped. None where no clock is published. (`optimal_seconds` of '
    '`cost_analysis()` counts a loop once and is negative for such programs.)',
)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--only', metavar='TEXT',
                      help='rows whose name has this in it, such as 27b-v5p')
  parser.add_argument('--again', action='store_true',
                      help='plan rows anew that are there')
  parser.add_argument('--out', type=pathlib.Path,
                      default=ROOT / 'experiments' / 'results')
  a = parser.parse_args(argv)
  folder = a.out / 'plans'
  folder.mkdir(parents=True, exist_ok=True)
  names, failed = [], []
  for name, command in _rows():
    file = folder / f'{name}.json'
    names.append(file)
    if (a.only and a.only not in name) or (file.exists() and not a.again):
      continue
    print(f'{time.strftime("%H:%M")} {name}', flush=True)
    done = subprocess.run(
        [sys.executable, '-m', 'gemma_qat', 'plan', *command,
         f'--json={file}'], cwd=ROOT, check=False,
    )
    if done.returncode:
      failed.append(name)
  _write(a.out / 'plans.md', [f for f in names if f.exists()])
  if failed:
    print(f'Without a plan: {", ".join(failed)}.', file=sys.stderr)
  return 1 if failed else 0


def topology(variant: str) -> str:
  """Says which devices a variant of a config is meant for.

  'v5p-2x2x4' -> 'v5p:2x2x4', 'h100-8' -> 'gpu:8xH100'.
  """
  kind, _, sizes = variant.partition('-')
  if 'x' in sizes:
    return f'{kind}:{sizes}'
  return f'gpu:{sizes}x{kind.upper()}'


def _rows():
  """(name, flags of `gemma-qat plan`) of every row, in the table's order."""
  for size in CONFIGS:
    config = importlib.import_module(f'experiments.configs.gemma3_{size}')
    chosen = [(v, '', ()) for v in config.DEVICES]
    chosen += [tuple(extra) for of, *extra in EXTRA if of == size]
    for variant, suffix, changes in chosen:
      yield '-'.join(filter(None, (size, variant, suffix))), [
          f'--config=experiments/configs/gemma3_{size}.py:{variant}',
          f'--size={size.partition("_")[0]}', f'--topology={topology(variant)}', *changes,
      ]


def _write(path, files):
  # Only now: whoever asks for --help should not wait for JAX.
  from gemma_qat.commands import plan_sheets
  from gemma_qat.reporting import sheets
  plans = [json.loads(f.read_text(encoding='utf-8')) for f in files]
  some = [
      sheets.Sheet(INTRODUCTION, (), []), plan_sheets.table(plans),
      sheets.Sheet('What the columns mean:', (), [], NOTES),
  ]
  text = sheets.set_markdown(some, 'Runs on machines that are not at hand')
  path.write_text(text, encoding='utf-8')
  print(f'{len(plans)} rows in {path}')


if __name__ == '__main__':
  sys.path.insert(0, str(ROOT))
  sys.exit(main())
