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
    said = json.loads(path.read_text(encoding='utf-8'))
    yield said.get('said', '')
    yield '![Memory and step time](soak.png)'


def _fuzz(out):
  path = out / 'fuzz.md'
  if path.exists():
    yield path.read_text(encoding='utf-8').replace('# ', '## ', 1).strip()
