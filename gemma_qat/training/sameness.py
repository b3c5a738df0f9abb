"""Are the results of two runs the same, and if not, where do they part?

Same means bit for bit; what measures time is left out. The first of two is
what *was*, the second what is *now*.
"""

from collections.abc import Iterator, Mapping, Sequence
import hashlib
import itertools
import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import orbax_arrays
from gemma_qat.checkpoints import orbax_files
from gemma_qat.training import speed

# The trees of a step, see `checkpoints.orbax_files` and `training.saving`.
_TREES = ('student', 'optimizer', 'tokenizer')
# Of a report: what measures time, or says where and with what it was made.
_OF_REPORTS = ('seconds', 'seconds_by_phase', 'device', 'git', 'engine')


class Verdict(NamedTuple):
  """Whether something is the same, and how that is said.

  is_same: whether it is. said: how much was compared, or what differs first.
  """

  is_same: bool
  said: str


def compare_steps(one: pathlib.Path, other: pathlib.Path) -> Verdict:
  """Compares every array of two checkpoints, bit by bit, a layer at a time.

  Args:
    one, other: folders of steps.

  Raises:
    UserError: one of them cannot be read.
  """
  left, right = _arrays(one), _arrays(other)
  said = []
  for name in sorted(left.keys() | right.keys()):
    text = _differ(name, left.get(name), right.get(name))
    if text:
      said.append(text)
  if not said:
    values = sum(math.prod(a.shape) for a in left.values())
    return Verdict(True, f'{len(left)} arrays, {values:,} values')
  text = f'{said[0]}; {len(said)} of {len(left)} arrays differ'
  texts = [orbax_files.load_manifest(s).get('text') for s in (one, other)]
  if texts[0] != texts[1]:
    text += '; the training text is not what it was'
  return Verdict(False, text + ''.join(map(_damage, (one, other))))


def compare_metrics(
    one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]
) -> Verdict:
  """Compares rows of `metrics.jsonl`."""
  if not one:
    return Verdict(not other, f'0 rows were there, now {len(other)}')
  rows = [
      {k: v for k, v in r.items() if not is_of_time(k)} for r in one
  ]
  for number, (was, now) in enumerate(itertools.zip_longest(
      rows, ({k: v for k, v in r.items() if not is_of_time(k)} for r in other)
  ), 1):
    if was is None or now is None:
      return Verdict(False, f'there were {len(one)} rows, now {len(other)}')
    said = _first(was, now)
    if said:
      where = f'row {number} (step {was.get("step", "?"):g})'
      return Verdict(False, f'{where}: {said}')
  return Verdict(
      True, f'{len(rows)} rows, {sum(map(len, rows)):,} values'
  )


def compare_reports(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> Verdict:
  """Compares what two `report.json` say, numbers and texts."""
  was, now = (
      _leaves({
          k: v for k, v in report.items()
          if k not in _OF_REPORTS and not is_of_time(k)
      }) for report in (one, other)
  )
  said = _first(was, now)
  return Verdict(not said, said or f'{len(was)} numbers and texts')


def compare_files(one: pathlib.Path, other: pathlib.Path) -> Verdict:
  """Compares two files byte by byte; says the SHA-256 of both."""
  sums = [sha256(path) for path in (one, other)]
  return Verdict(sums[0] == sums[1], (
      f'{one.stat().st_size:,} bytes, now {other.stat().st_size:,}\n'
      f'  sha256 {sums[0]} was\n  sha256 {sums[1]} now'
  ))


def sha256(path: str | os.PathLike) -> str:
  """The SHA-256 of a file, in hexadecimal."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def is_of_time(name: str) -> bool:
  """Whether a column of the metrics measures time."""
  return name in speed.NAMES or name.endswith(('seconds', '_per_second'))


def _damage(step):
  """Says so if the step itself has changed since it was saved."""
  try:
    orbax_files.verify(step)
  except errors.UserError as error:
    return f'; {error}'
  return ''


def _arrays(step):
  return {
      f'{tree}/{name}': array
      for tree in _TREES if (step / tree).is_dir()
      for name, array in orbax_arrays.open_tree(step / tree).items()
  }


def _differ(name, was, now):
  """How two arrays differ, '' where they do not; None is one not there."""
  if was is None or now is None:
    return f'{name} was {_kind(was)}, now {_kind(now)}'
  if (was.shape, was.dtype) != (now.shape, now.dtype):
    return f'{name} was {_kind(was)}, now {_kind(now)}'
  count, most = 0, 0.0
  for index in _pieces(was.shape):
    x, y = np.atleast_1d(was.read(index)), np.atleast_1d(now.read(index))
    differs = _bits(x) != _bits(y)
    if differs.any():
      count += int(differs.sum())
      gaps = np.abs(x[differs].astype(np.float64) - y[differs])
      # NaN stays NaN.
      most = float(np.maximum(most, gaps.max()))
  return count and (
      f'{name}: {count:,} of {math.prod(was.shape):,} values differ, by '
      f'{most:.3g} at most'
  )


def _kind(array):
  return 'not there' if array is None else (
      f'{array.dtype} {list(array.shape)}'
  )


def _pieces(shape) -> Iterator[orbax_arrays.Index]:
  """Indices of the layers of a stack; of the whole of anything else."""
  return iter([(i,) for i in range(shape[0])] if len(shape) > 2 else [()])


def _bits(x):
  return np.ascontiguousarray(x).view(f'u{x.dtype.itemsize}')


def _first(was, now):
  """What differs first in two flat dicts, '' where nothing does."""
  for name in dict.fromkeys([*was, *now]):
    if name not in was or name not in now or not _equal(was[name], now[name]):
      say = lambda d, name=name: repr(d[name]) if name in d else 'not there'
      return f'{name} was {say(was)}, now {say(now)}'
  return ''


def _equal(a, b):
  # A NaN that comes again is the same result.
  return a == b or (a != a and b != b)


def _leaves(tree, prefix=''):
  if isinstance(tree, Mapping):
    pairs = tree.items()
  elif isinstance(tree, list):
    pairs = enumerate(tree)
  else:
    return {prefix.removesuffix('.'): tree}
  found = {}
  for key, value in pairs:
    found |= _leaves(value, f'{prefix}{key}.')
  return found
