"""How are two programs compared on a machine that is never quiet?

They run one after the other, over and over, so that whatever else the machine
does slows both. Every benchmark prints one line of JSON with `KEYS`, whose
figures are medians.
"""

import argparse
import json
import statistics
import time
from typing import Any, Callable, Mapping

import jax

from gemma_qat import compiled
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
    alone), `ratio_range` (of the rounds), `repeats` and, on a CPU, `cpu_ratio`:
    the same of processor time over all threads, which waiting for other
    people's work does not count in.
  """
  spend(ours), spend(other)
  rounds = [(spend(ours), spend(other)) for _ in range(repeats)]
  wall, processor = (
      [ours[i] / max(other[i], 1e-9) for ours, other in rounds] for i in (0, 1)
  )
  timed = {
      'ours': statistics.median(ours[0] for ours, _ in rounds),
      'other': statistics.median(other[0] for _, other in rounds),
      'ratio': statistics.median(wall),
      'ratio_range': [min(wall), max(wall)],
      'unit': 's',
      'repeats': repeats,
  }
  if jax.default_backend() == 'cpu':
    timed['cpu_ratio'] = statistics.median(processor)
  return timed


def spend(run: Callable[[], Any]) -> tuple[float, float]:
  """Wall and processor seconds of one call, its arrays computed.

  What runs in a process of its own says its processor time itself, by a method
  `process_time`.
  """
  clock = getattr(run, 'process_time', time.process_time)
  start, used = time.perf_counter(), clock()
  jax.block_until_ready(run())
  return time.perf_counter() - start, clock() - used


def as_rates(timed: Mapping[str, Any], count: int, unit: str):
  """Turns the seconds of `interleave` into `count` things per second."""
  turned = {k: 1 / timed[k] for k in ('ratio', 'cpu_ratio') if k in timed}
  return {
      **timed,
      **turned,
      'ours': count / timed['ours'],
      'other': count / timed['other'],
      'ratio_range': sorted(1 / r for r in timed['ratio_range']),
      'unit': unit,
  }


def temporary_gb(lowered) -> float:
  """What a program allocates beside its arguments and results.

  On a CPU without the fusions of libraries, which do not tell.
  """
  options = compiled.NO_LIBRARIES if jax.default_backend() == 'cpu' else {}
  program = compiled.compile_to_ask(lowered, options)
  return compiled.memory(program).temporaries / 1e9


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
