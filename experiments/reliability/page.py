"""How is it said what runs survived?"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from gemma_qat.reporting import markdown

_TITLE = '''# What runs survive

Made by `python -m experiments.reliability`: `gemma-qat run` on `tiny`, random
weights, 40 steps with a checkpoint every fourth, disturbed and started again by
the same command. Lost is what did not end with the checkpoint, metrics (all but
those of time), report and files of the undisturbed run, bit for bit, or did not
say in one line what was wrong. Moved between meshes, metrics may differ by
0.2 %, since sums are rounded in another order.'''


def write(out: pathlib.Path, found: Mapping[str, Mapping[str, Any]]) -> None:
  """Writes reliability.md from the rows, and from what lies beside it."""
  rows = [
      (name, row['trials'], row['trials'] - row['lost'], row['lost'],
       f'{row["seconds"] / max(1, row["trials"]):.0f}')
      for name, row in found.items()
  ]
  total = [sum(r[i] for r in rows) for i in (1, 2, 3)]
  parts = [
      _TITLE,
      markdown.table(
          ('disturbance', 'trials', 'survived', 'lost', 's a trial'),
          [*rows, ('all', *total, '')],
      ),
      _made_by(found),
      *_notes(found), *_soak(out), *_fuzz(out),
  ]
  path = out / 'reliability.md'
  path.write_text('\n\n'.join(parts) + '\n', encoding='utf-8')
  print(f'{total[0]} trials, {total[2]} lost: {path}')


def _made_by(found):
  devices = sorted({row['device'] for row in found.values()})
  revisions = sorted({row['git'][:12] for row in found.values()})
  return f'On {", ".join(devices)}, revision {", ".join(revisions)}.'


def _notes(found):
  damaged = [
      did for name, row in found.items() if ' in ' in name and 'a ' in name[:2]
      for did, _ in row['details']
  ]
  noticed = sum(did.endswith('noticed') for did in damaged)
  if damaged:
    yield (
        f'Of {len(damaged)} damages to a checkpoint {noticed} were noticed and '
        'the run fell back to the step before; the others hit bytes that hold '
        'nothing of the run (such as descriptions that Orbax writes twice), '
        'and it ended the same.'
    )
  for did, _ in found.get('one of two processes killed', {}).get('details', ()):
    yield f'- Two processes: {did}.'
  for did, _ in found.get(
      'moved between 1, 2, 4 and 8 devices', {}
  ).get('details', ()):
    yield f'- One run: {did}.'


def _soak(out):
  path = out / 'soak.json'
  if path.exists():
    yield '## A long run'
    s = json.loads(path.read_text(encoding='utf-8'))
    yield (
        f'Made by `python experiments/soak.py`: {s["steps"]:,.0f} steps of '
        f'`tiny`, evaluated and saved every {s["evaluate_and_save_every"]}. '
        'After the first quarter, in 1,000 steps: memory '
        f'{s["rss_mb_per_1000_steps"]:+.1f} MB, metrics.jsonl '
        f'{s["metrics_kb_per_1000_steps"]:+.0f} kB, events '
        f'{s["events_kb_per_1000_steps"]:+.0f} kB; open files '
        f'{s["open_files_last_minus_warm"]:+.0f} and threads '
        f'{s["threads_last_minus_warm"]:+.0f} from first to last. CPU time of '
        'a step, last quarter over second: '
        f'{s["cpu_time_last_to_second_quarter"]:.2f}.'
    )
    yield '![Memory and step time](soak.png)'


def _fuzz(out):
  path = out / 'fuzz.md'
  if path.exists():
    yield '## Damaged files'
    yield path.read_text(encoding='utf-8').strip()
