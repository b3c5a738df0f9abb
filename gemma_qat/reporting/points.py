"""What distinguishes several runs, and which differ only in their seed?"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import os
import statistics
import sys
from typing import Any

from gemma_qat import errors

# Dotted names in report.json that a comparison needs.
_NUMBERS = (
    'steps', 'tokens', 'seconds', 'ppl.base', 'ppl.ptq', 'ppl.qat', 'kld.ptq',
    'kld.qat', 'kld_stderr.qat', 'top1.ptq', 'top1.qat', 'bytes.ptq',
    'bytes.qat', 'chunks', 'context', 'tokens_scored',
)
_SHARES = ('recovered_ppl', 'recovered_kld')
_TEXTS = ('device', 'engine', 'text', 'base', 'model')
_SEED, _NAME = 'seed', 'name'
_ABSENT = '(not there)'


@dataclasses.dataclass(frozen=True)
class Point:
  """One run.

  Attributes:
    name: of its folder.
    config: dotted field -> value, as config.json holds it.
    heldout: (tokens, held-out KL in nats) wherever it was measured.
    report: as in report.json; None where the run is not finished.
    state: how far it came, in words.
  """

  name: str
  config: Mapping[str, Any]
  heldout: Sequence[tuple[float, float]]
  report: Mapping[str, Any] | None
  state: str


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that differ in nothing but their seed; at least one.

  Attributes:
    name: what their names begin with.
    points: all finished, or all not.
    changes: dotted field -> value, where they differ from the other groups.
  """

  name: str
  points: tuple[Point, ...]
  changes: Mapping[str, Any]


def make_point(
    name: str,
    config: Mapping[str, Any],
    rows: Sequence[Any],
    report: Mapping[str, Any] | None,
    state: str,
) -> Point:
  """Makes a point of what a run left.

  Args:
    name: of the run.
    config: dotted field -> value.
    rows: of metrics.jsonl.
    report: of report.json, if there is one.
    state: how far it came.

  Raises:
    UserError: the report lacks what a comparison needs.
  """
  if report is not None:
    _check(report)
  sizes = [config.get(f'train.{k}') for k in ('batch_size', 'length')]
  a_step = math.prod(n for n in sizes if _is_number(n))
  heldout = tuple(
      (row['step'] * a_step, row['heldout_kl_nats']) for row in rows
      if isinstance(row, dict) and _is_number(row.get('step'))
      and _is_number(row.get('heldout_kl_nats'))
  )
  return Point(name, config, heldout, report, state)


def figure(point: Point, path: str) -> Any:
  """One figure of a run: 'kld.qat' of its report, None where there is none.

  'heldout.first' and 'heldout.last' are the held-out KL at step 0 and last.
  """
  if path in ('heldout.first', 'heldout.last'):
    if not point.heldout:
      return None
    return point.heldout[0 if path.endswith('first') else -1][1]
  return None if point.report is None else _look_up(point.report, path)


def mean(group: Group, path: str) -> tuple[float | None, float | None]:
  """A figure over the seeds.

  Returns:
    (mean, sample standard deviation); None for a mean where one of the runs
    has no such figure, and for a deviation of less than two runs.
  """
  values = [figure(p, path) for p in group.points]
  if any(v is None for v in values):
    return None, None
  spread = statistics.stdev(values) if len(values) > 1 else None
  return statistics.fmean(values), spread


def group(points: Sequence[Point]) -> list[Group]:
  """Puts together what differs only in the seed, in order of appearance.

  A field of the config is a group's change if its value is not the one that
  most groups have; where no value is the most frequent, every group shows its
  own.
  """
  parts = {}
  for point in points:
    fields = {k: v for k, v in point.config.items() if k != _SEED}
    # What never began has no config: it is like nothing else.
    key = (
        point.report is None, json.dumps(fields, sort_keys=True),
        '' if point.config else point.name,
    )
    parts.setdefault(key, []).append(point)
  changes = _changes([members[0].config for members in parts.values()])
  names = [_shared_name([p.name for p in m]) for m in parts.values()]
  return [
      Group(
          n if names.count(n) == 1 else members[0].name, tuple(members), c
      )
      for n, members, c in zip(names, parts.values(), changes)
  ]


def say_changes(changes: Mapping[str, Any]) -> str:
  """Writes changed fields: 'quant.start=gptq, seed=1'."""
  say = lambda v: v if isinstance(v, str) else json.dumps(v)
  return ', '.join(f'{k}={say(v)}' for k, v in changes.items()) or '-'


def _changes(configs):
  """For each config the fields in which it is not as the others."""
  found = [{} for _ in configs]
  begun = [c for c in configs if c]
  for field in dict.fromkeys(k for c in begun for k in c):
    if field in (_SEED, _NAME):
      continue
    values = [json.dumps(c.get(field, _ABSENT)) for c in begun]
    counts = sorted(map(values.count, set(values)), reverse=True)
    if len(counts) == 1:
      continue
    usual = None
    if counts[0] > counts[1]:
      usual = next(v for v in values if values.count(v) == counts[0])
    for config, changes in zip(configs, found):
      value = config.get(field, _ABSENT)
      if config and json.dumps(value) != usual:
        changes[field] = value
  return found


def _shared_name(names):
  """What names begin with, without a torn-off number's hyphen or 'seed'."""
  if len(names) == 1:
    return names[0]
  start = os.path.commonprefix(names).rstrip('-_.+=')
  return start.removesuffix('seed').rstrip('-_.+=') or start or names[0]


def _check(report):
  for path in _NUMBERS:
    if not _is_number(_look_up(report, path)):
      raise errors.UserError(
          f'report.json has no number {path}: run gemma-qat run there again, '
          'or leave this run out.'
      )
  for path in _SHARES:
    if not (report.get(path) is None or _is_number(report[path])):
      raise errors.UserError(
          f'report.json: {path} is neither a number nor null.'
      )
  for path in _TEXTS:
    if not isinstance(report.get(path), str):
      raise errors.UserError(f'report.json has no text {path}.')


def _look_up(report, path):
  value = report
  for part in path.split('.'):
    value = value.get(part) if isinstance(value, dict) else None
  return value


def _is_number(value):
  return (
      isinstance(value, (int, float)) and not isinstance(value, bool)
      # Not math.isfinite, which fails on whole numbers of 400 figures.
      and abs(value) <= sys.float_info.max
  )
