"""Disturbs small runs in every way that is known here, and counts what is lost.

  python -m experiments.reliability [--only=kill] [--again]

Makes experiments/results/reliability.json, a row for every kind of disturbance
as it is done (there already: kept, unless --again), and reliability.md, with
what `experiments/soak.py` and `experiments/fuzz` found. About half an hour on
two cores. Full and read-only disks are tried by root alone.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# pylint: disable=wrong-import-position
from experiments.reliability import commands
from experiments.reliability import page
from experiments.reliability import trials
from gemma_qat.training import workdir as workdirs

_KILL, _TERM, _INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


def kinds(expected, scratch, draw, usual):
  """{name: iterator of trials}, in the order of the table."""
  kill = lambda *arguments: trials.kills(
      expected, scratch, draw, usual, *arguments
  )
  damage = lambda *arguments: trials.damages(expected, scratch, draw, *arguments)
  found = {
      'kill -9, any time': kill(_KILL, 'any time', 10),
      'kill -9, during a step': kill(_KILL, 'a step', 8),
      'kill -9, while a checkpoint is written': kill(_KILL, 'a checkpoint', 6),
      'kill -9, during the export': kill(_KILL, 'the export', 5),
      'SIGTERM, any time': kill(_TERM, 'any time', 5),
      'SIGTERM, during the export': kill(_TERM, 'the export', 2),
      'SIGINT, any time': kill(_INT, 'any time', 2),
      'SIGINT, during a step': kill(_INT, 'a step', 2),
      'a flipped bit in the newest checkpoint': damage('a flipped bit', 6),
      'a lost end of a file in it': damage('a lost end', 3),
      'a lost file in it': damage('a lost file', 3),
  }
  if trials.can_mount():
    found |= {
        'a full disk': trials.full_disks(expected, scratch, draw, 3),
        'refusals, and on after them': trials.refusals(expected, scratch, draw),
    }
  return found | {
      'moved between 1, 2, 4 and 8 devices': trials.meshes(
          expected, scratch, draw
      ),
      'one of two processes killed': trials.peers(expected, scratch, draw, 2),
  }


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--only', default='', help='kinds with this in the name')
  parser.add_argument('--again', action='store_true')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', type=pathlib.Path,
                      default=ROOT / 'experiments' / 'results')
  a = parser.parse_args()
  path = a.out / 'reliability.json'
  found = json.loads(path.read_text()) if path.exists() else {}
  lost = 0
  with tempfile.TemporaryDirectory(prefix='reliability-') as folder:
    folder = pathlib.Path(folder)
    # Else processes that compile for seconds would be killed in nothing else.
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'programs')
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
    expected = folder / 'undisturbed'
    names = list(kinds(None, None, None, None))
    names = [n for n in names if a.only in n and (a.again or n not in found)]
    if names:
      # Twice: the second finds its programs compiled, as all others do.
      for workdir in (folder / 'first', expected):
        began = time.monotonic()
        code, said = commands.run('run', workdir)
        usual = time.monotonic() - began
        if code:
          raise SystemExit(f'The undisturbed run failed: {said}')
      if said := commands.differences(folder / 'first', expected):
        raise SystemExit(f'Two undisturbed runs differ: {said}')
    for name in names:
      scratch = folder / 'scratch'
      scratch.mkdir()
      draw = random.Random(f'{name} {a.seed}')
      began, done = time.monotonic(), []
      for trial in kinds(expected, scratch, draw, usual)[name]:
        done.append(trial)
        print(f'{time.strftime("%H:%M:%S")} {name}: {trial.did}'
              + (f': LOST: {trial.lost}' if trial.lost else ''), flush=True)
      found[name] = {
          'trials': len(done),
          'lost': sum(bool(t.lost) for t in done),
          'details': [list(t) for t in done],
          'seconds': round(time.monotonic() - began),
          'device': workdirs.device_name(),
          'git': workdirs.git_revision(),
          'seed': a.seed,
      }
      path.write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')
      commands.remove(scratch)
  lost = sum(row['lost'] for row in found.values())
  page.write(a.out, found)
  return 1 if lost else 0


if __name__ == '__main__':
  sys.exit(main())
