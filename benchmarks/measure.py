"""How are two programs compared on a machine that is never quiet?

Both run in one process, one after the other, over and over, so that whatever
else the machine does slows both. Every benchmark prints one line of JSON with
`KEYS`, whose figures are medians.
"""

import argparse
import json
import statistics
import time
from typing import Any, Callable, Mapping

import jax

from gemma_qat.training import workdir

KEYS = ('what', 'shapes', 'device', 'ours', 'other', 'ratio', 'unit')


def make_parser(doc: str, repeats: int) -> argparse.ArgumentParser:
  """Returns a parser that knows --repeats; `doc` is the module's."""
  parser = argparse.ArgumentParser(
      description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--repeats', type=int, default=repeats,
                      help='measured rounds, each of both programs')
  return parser


def interleave(
    ours: Callable[[], Any], other: Callable[[], Any], repeats: int
) -> dict[str, Any]:
  """Times two programs in turn, after one unmeasured call of each.

  Returns:
    The fields `ours`, `other` (median seconds of a call), `ratio` (the median
    over the rounds of ours / other: what disturbs a whole round leaves it
    alone), `ratio_range` (of the rounds) and `repeats`.
  """
  seconds(ours), seconds(other)
  rounds = [(seconds(ours), seconds(other)) for _ in range(repeats)]
  ratios = [a / b for a, b in rounds]
  return {
      'ours': statistics.median(a for a, _ in rounds),
      'other': statistics.median(b for _, b in rounds),
      'ratio': statistics.median(ratios),
      'ratio_range': [min(ratios), max(ratios)],
      'unit': 's',
      'repeats': repeats,
  }


def seconds(run: Callable[[], Any]) -> float:
  """Wall time of one call, its arrays computed."""
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start


def as_rates(timed: Mapping[str, Any], count: int, unit: str):
  """Turns the seconds of `interleave` into `count` things per second."""
  return {
      **timed,
      'ours': count / timed['ours'],
      'other': count / timed['other'],
      'ratio': 1 / timed['ratio'],
      'ratio_range': sorted(1 / r for r in timed['ratio_range']),
      'unit': unit,
  }


def temporary_gb(compiled) -> float:
  """What a compiled program allocates beside its arguments and results."""
  return compiled.memory_analysis().temp_size_in_bytes / 1e9


def emit(what: str, shapes: str, timed: Mapping[str, Any], **more) -> None:
  """Prints the line.

  Args:
    what: the claim's two sides, in words.
    shapes: the sizes that were measured.
    timed: from `interleave` or `as_rates`.
    **more: other fields, such as ours_temporary_gb.
  """
  line = {
      'what': what, 'shapes': shapes, 'device': workdir.device_name(),
      **timed, **more,
  }
  print(json.dumps({k: _rounded(v) for k, v in line.items()}), flush=True)


def _rounded(value):
  if isinstance(value, list):
    return [_rounded(v) for v in value]
  return float(f'{value:.4g}') if isinstance(value, float) else value
