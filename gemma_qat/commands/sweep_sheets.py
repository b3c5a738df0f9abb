"""How are a sweep's points and results said on a terminal?"""

from collections.abc import Mapping, Sequence
import pathlib
import signal

from gemma_qat import errors
from gemma_qat.commands import run_folders
from gemma_qat.commands import sweep_points
from gemma_qat.reporting import points as points_lib
from gemma_qat.reporting import tables

_RESULTS = (
    ('held-out KL', 'heldout.last', tables.nats),
    ('PPL', 'ppl.qat', tables.perplexity),
    ('KLD', 'kld.qat', tables.nats),
    ('PPL won back', 'recovered_ppl', tables.percent),
    ('KLD won back', 'recovered_kld', tables.percent),
)


def listing(
    points: Sequence[sweep_points.Point],
    states: Mapping[str, sweep_points.State],
) -> str:
  """Sets the points that have a state, with their place among all."""
  rows = [
      (str(i), p.name, points_lib.say_changes(p.changes),
       _short(states[p.name]))
      for i, p in enumerate(points) if p.name in states
  ]
  return tables.set_plain(
      ('index', 'point', 'changes', 'state'), rows, left=4
  )


def ended(name: str, folder: pathlib.Path, exit_code: int) -> str:
  """Says in a line what came of a point."""
  if exit_code:
    word = f'failed with exit code {exit_code}'
    if exit_code == errors.Stopped.exit_code:
      word = 'stopped'
    elif exit_code < 0:
      # SIGKILL is what Linux sends where memory has run out.
      word = f'ended by {signal.Signals(-exit_code).name}'
    return f'{name}: {word}, see {folder / run_folders.LOG}'
  point = run_folders.read(folder, name)
  first, last = (
      tables.nats(points_lib.figure(point, f'heldout.{k}'))
      for k in ('first', 'last')
  )
  ppl, kld = (
      tables.percent(points_lib.figure(point, f'recovered_{k}'))
      for k in ('ppl', 'kld')
  )
  seconds = points_lib.figure(point, 'seconds')
  return (
      f'{name}: held-out KL {first} -> {last} nats; won back: perplexity '
      f'{ppl}, KL divergence {kld}; {seconds:,.0f} s'
  )


def results(
    workdir: pathlib.Path,
    states: Mapping[str, sweep_points.State],
    exit_codes: Mapping[str, int],
) -> str:
  """Sets all points with how they stand and what they reached.

  Args:
    workdir: of the sweep.
    states: of the points, by name.
    exit_codes: of those that ran now.
  """
  rows = []
  for name, state in states.items():
    cells = [tables.ABSENT] * len(_RESULTS)
    if state.kind == sweep_points.FINISHED:
      point = run_folders.read(workdir / name, name)
      cells = [
          tables.ABSENT if value is None else write(value)
          for _, path, write in _RESULTS
          for value in [points_lib.figure(point, path)]
      ]
    failed = exit_codes.get(name, 0) not in (0, errors.Stopped.exit_code)
    text = _short(state)
    rows.append((name, f'failed, {text}' if failed else text, *cells))
  return tables.set_plain(
      ('point', 'state', *(c for c, _, _ in _RESULTS)), rows, left=2
  )


def reason(folder: pathlib.Path, state: sweep_points.State) -> str:
  """Says in a line why a point is not finished, and where to look."""
  if state.kind == sweep_points.REFUSED:
    return 'it was begun with another config, as said above.'
  log = folder / run_folders.LOG
  lines = []
  if log.is_file():
    lines = log.read_text(encoding='utf-8', errors='replace').split('\n')
  last = next((x.strip() for x in reversed(lines) if x.strip()), 'no output')
  # One printable line, whatever a log holds.
  return f'{errors.UserError(last)} (log: {log})'


def _short(state):
  return state.kind if state.kind == sweep_points.REFUSED else state.text
