"""What are the points of a sweep, and how does each of them stand?

A point is the config with some changed fields, in a folder of its own. The
config's file says them, beside `get_config`:

  def sweep(add):
    add('reference', {'quant.start': 'reference'})
    for seed in range(3):
      add(f'gptq-{seed}', {'quant.start': 'gptq'}, seed=seed)
"""

from collections.abc import Mapping, Sequence
import copy
import dataclasses
import difflib
import pathlib
import re
from typing import Any, NamedTuple

import ml_collections

from gemma_qat import errors
from gemma_qat.commands import config_flags
from gemma_qat.reporting import report as reporting
from gemma_qat.training import saving
from gemma_qat.training import settings
from gemma_qat.training import workdir as workdirs

FINISHED, BEGUN, NEW, REFUSED = 'finished', 'begun', 'not begun', 'refused'
# A folder's name everywhere; no comma, which parts the names of --only.
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._=+-]{0,99}')


@dataclasses.dataclass(frozen=True)
class Point:
  """One config of a sweep.

  Attributes:
    name: of the point and its folder.
    changes: dotted field -> value.
    config: the resolved config, locked.
  """

  name: str
  changes: Mapping[str, Any]
  config: ml_collections.ConfigDict


class State(NamedTuple):
  """How a point stands: one of this module's words, and more in a line."""

  kind: str
  text: str


def read(path: str, overrides: Sequence[str] = ()) -> list[Point]:
  """Reads a config file and makes the points of its `sweep(add)`.

  Nothing here asks JAX for devices: the processes that compute need them.

  Args:
    path: FILE.py[:VARIANT].
    overrides: '--config.FIELD=VALUE', the same for all points.

  Raises:
    UserError: the config has no sweep, or a point cannot be: its name, an
      unknown field, a value of the wrong type or one that training refuses.
  """
  config = config_flags.load(path, overrides)
  sweep = config_flags.read_function(path, 'sweep')
  if sweep is None:
    raise errors.UserError(
        f'--config={path} defines no sweep(add): write one beside get_config, '
        'as experiments/configs/ablations/starts.py does, or use gemma-qat '
        'run.'
    )
  points = {}

  def add(name, changes=None, /, **fields):
    _check_name(name, points)
    with errors.about(f'point {name!r}'):
      points[name] = _make(name, changes, fields, config)

  try:
    with errors.about(f'--config={path}'):
      sweep(add)
  except errors.UserError:
    raise
  # As in `config_flags.load`: a config is Python.
  except Exception as error:
    raise errors.UserError(
        f'--config={path}, sweep(add): {type(error).__name__}: {error}'
    ) from error
  if not points:
    raise errors.UserError(f'--config={path}: sweep(add) added no point.')
  _check_overrides(overrides, points.values())
  return list(points.values())


def choose(points: Sequence[Point], names: str | None) -> list[Point]:
  """Picks the points named 'a,b' in their own order; all for None."""
  if names is None:
    return list(points)
  wanted = [n for n in names.split(',') if n]
  known = [p.name for p in points]
  unknown = [n for n in wanted if n not in known]
  if unknown or not wanted:
    raise errors.UserError(
        f'--only={names}: there is no point {"".join(unknown[:1])!r}, only '
        f'{", ".join(known)}.'
    )
  return [p for p in points if p.name in wanted]


def find(points: Sequence[Point], key: str) -> Point:
  """Finds a point by its name or its index from 0."""
  for i, point in enumerate(points):
    if key in (point.name, str(i)):
      return point
  raise errors.UserError(
      f'--point={key}: there are the points 0 to {len(points) - 1}: '
      f'{", ".join(p.name for p in points)}.'
  )


def state(point: Point, folder: pathlib.Path) -> State:
  """Says how far a point came in its folder; writes nothing."""
  try:
    if not workdirs.is_begun(folder, point.config):
      return State(NEW, NEW)
  except errors.UserError as error:
    return State(
        REFUSED, f'{error} To begin this point anew, remove {folder}.'
    )
  if (folder / reporting.JSON).is_file():
    return State(FINISHED, FINISHED)
  step = saving.latest(folder)
  return State(BEGUN, BEGUN if step is None else f'stopped at step {step}')


def _check_name(name, points):
  if not isinstance(name, str) or not _NAME.fullmatch(name) or name.isdigit():
    raise errors.UserError(
        f'A point cannot be called {name!r}, for it gets a folder of this '
        'name: use letters, digits, and . _ = + - inside, not digits alone.'
    )
  # Some disks take 'A' and 'a' for one folder.
  if name.casefold() in {n.casefold() for n in points}:
    raise errors.UserError(
        f'Two points of the sweep are called {name!r}: give each its own name.'
    )


def _make(name, changes, fields, config):
  if changes is not None and not isinstance(changes, Mapping):
    raise errors.UserError(
        f"{changes!r} is not {{'field.name': value}}: write "
        "add('name', {'optimizer.learning_rate': 1e-3})."
    )
  changes = {**(changes or {}), **fields}
  config = copy.deepcopy(config)
  for field, value in changes.items():
    _set(config, field, value)
  _check(config)
  return Point(name, changes, config)


def _set(config, field, value):
  """Changes one field, if there is such a field of such a type."""
  names = list(workdirs.flat(config.to_dict()))
  if any(n.startswith(f'{field}.') for n in names):
    raise errors.UserError(
        f'{field} is a section: name its fields one by one, as '
        f'{next(n for n in names if n.startswith(f"{field}."))}.'
    )
  if field not in names:
    near = difflib.get_close_matches(str(field), names, 1)
    raise errors.UserError(
        f'{field} is no field of the config: '
        + (f'did you mean {near[0]}?' if near else 'base.py has them all.')
    )
  *sections, leaf = field.split('.')
  node = config
  for section in sections:
    node = node[section]
  old = node[leaf]
  try:
    # ml_collections takes None for anything, and True for 1.
    if old is not None and (
        value is None or isinstance(value, bool) != isinstance(old, bool)
    ):
      raise TypeError
    node[leaf] = value
  except TypeError as error:
    raise errors.UserError(
        f'{field}={value!r} is of type {type(value).__name__}, where '
        f'{type(old).__name__} is wanted, as {old!r}.'
    ) from error


def _check(config):
  """Refuses what training would, without asking for devices."""
  config = copy.deepcopy(config)
  if config.compute.dtype == 'auto':
    config.compute.dtype = 'bfloat16'
  try:
    settings.read(config)
  except (TypeError, ValueError) as error:
    raise errors.UserError(f'{error}') from error


def _check_overrides(overrides, points):
  for override in overrides:
    field = override.removeprefix('--config.').split('=')[0]
    names = [p.name for p in points if field in p.changes]
    if names:
      raise errors.UserError(
          f'{override}: the points {", ".join(names)} change this field '
          'themselves: leave it out, or change the config.'
      )
