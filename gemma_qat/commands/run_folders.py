"""Which runs lie in these folders, and what did each of them leave?"""

from collections.abc import Sequence
import json
import pathlib

from gemma_qat import errors
from gemma_qat.reporting import points
from gemma_qat.reporting import report as reporting
from gemma_qat.training import metrics
from gemma_qat.training import saving
from gemma_qat.training import workdir as workdirs

LOG = 'log.txt'


def collect(folders: Sequence[pathlib.Path]) -> list[points.Point]:
  """Reads the runs in workdirs and in folders of sweeps.

  Raises:
    UserError: a folder holds no run, or files of one are damaged.
  """
  found = []
  for folder in folders:
    if not folder.is_dir():
      raise errors.UserError(
          f'{folder} is no folder: give workdirs of gemma-qat run, or of '
          'gemma-qat sweep.'
      )
    runs = [folder] if is_run(folder) else sorted(
        f for f in folder.iterdir() if f.is_dir() and is_run(f)
    )
    if not runs:
      raise errors.UserError(
          f'{folder} holds no run (no {workdirs.CONFIG}, neither in it nor in '
          'a folder of it): give the --workdir of gemma-qat run or sweep.'
      )
    found += runs
  found = list(dict.fromkeys(f.resolve() for f in found))
  names = [f.name for f in found]
  return [
      read(f, f.name if names.count(f.name) == 1 else
           f'{f.parent.name}/{f.name}')
      for f in found
  ]


def is_run(folder: pathlib.Path) -> bool:
  """Whether a run, or the point of a sweep, began in this folder."""
  return (folder / workdirs.CONFIG).is_file() or (folder / LOG).is_file()


def read(folder: pathlib.Path, name: str) -> points.Point:
  """Reads what one run left.

  Raises:
    UserError: a file of it is damaged.
  """
  config = _json(folder / workdirs.CONFIG)
  report = _json(folder / reporting.JSON)
  step = saving.latest(folder)
  state = (
      'finished' if report is not None
      else f'stopped at step {step}' if step is not None
      else 'no step yet' if config is not None
      else f'ended before it began: see its {LOG}'
  )
  with errors.about(folder):
    return points.make_point(
        name, workdirs.flat(config or {}), metrics.read(folder), report, state
    )


def _json(path):
  if not path.is_file():
    return None
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError) as error:
    raise errors.UserError(
        f'{path} cannot be read ({error}): run the command that wrote it '
        'again, or leave this run out.'
    ) from error
  if not isinstance(found, dict):
    raise errors.UserError(f'{path} is damaged: it holds no JSON object.')
  return found
