"""How are the figures of a plan set?

GB are 10^9 bytes. A time "at best" has products, memory and links work at
their published peaks at once; "estimated" adds up the cycles that the compiler
counts and the time of the links.
"""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any

from gemma_qat.reporting import sheets
from gemma_qat.reporting import tables
from gemma_qat.training import forecast as forecasts

COLUMNS = (
    'size', 'devices', 'data x fsdp x tensor', 'gathers', 'rows x tokens',
    'trained', 'by', 'compiler', 'weights', 'optimizer', 'teacher',
    'temporaries', 'total', 'left over', 'GB sent', 'TFLOP', 'links s',
    'at best s', 'MFU', 'h', 'estimated s', 'MFU', 'h',
)
_WORDS = 8


def figures(found: forecasts.Forecast) -> dict[str, Any]:
  """Everything in plain units, for a file: bytes, FLOPs, seconds, hours."""
  memory = found.memory and dataclasses.asdict(found.memory)
  contents = found.contents
  return {
      'size': found.size,
      'topology': found.topology.name,
      'devices': found.topology.count,
      'device': dataclasses.asdict(found.topology.device),
      'compiler': found.compiler,
      'compile_seconds': found.seconds,
      'mesh': dict(found.mesh),
      'gather': found.gather,
      'batch_size': found.batch,
      'length': found.length,
      'steps': found.steps,
      'trained': found.trained,
      'moments': found.moments,
      'model_flops': found.model_flops,
      'arguments_bytes': dict(found.parts),
      'memory_bytes': memory,
      'refusal': found.refusal,
      'needed_bytes': found.needed,
      'spare_bytes': found.spare,
      'flops': contents and contents.flops,
      'traffic_bytes': contents and contents.memory_bytes,
      'cycles': contents and contents.cycles,
      'unknown_loops': contents and list(contents.unknown_loops),
      'uncounted': contents and list(contents.uncounted),
      'collectives': contents and {
          kind: {'runs': runs, 'whole_bytes': whole, 'sent_bytes': sent}
          for kind, (runs, whole, sent) in contents.by_kind().items()
      },
      'product_seconds': found.product_seconds,
      'memory_seconds': found.memory_seconds,
      'link_seconds': found.link_seconds,
      'cycle_seconds': found.cycle_seconds,
      'best_seconds': found.best_seconds,
      'best_mfu': found.utilisation(found.best_seconds),
      'best_hours': found.hours(found.best_seconds),
      'estimated_seconds': found.estimated_seconds,
      'estimated_mfu': found.utilisation(found.estimated_seconds),
      'estimated_hours': found.hours(found.estimated_seconds),
  }


def detail(found: forecasts.Forecast) -> list[sheets.Sheet]:
  """One plan: memory, what is moved, how long it takes."""
  f = figures(found)
  mesh = ' '.join(f'{axis}={n}' for axis, n in found.mesh.items())
  title = (
      f'{found.size} on {found.topology.name} ({mesh} gather={found.gather}), '
      f'{found.batch} x {found.length} tokens a step; trained: '
      f'{found.trained} by {found.moments}. Compiled by '
      f'{found.compiler} in {found.seconds:.0f} s.'
  )
  some = [_memory(f, title)]
  if found.contents is not None:
    some += [_moved(f), _time(f)]
  return some


def row(f: Mapping[str, Any]) -> tuple[str, ...]:
  """One plan as a row under COLUMNS."""
  parts, memory = f['arguments_bytes'], f['memory_bytes']
  sent = None if f['collectives'] is None else sum(
      c['sent_bytes'] for c in f['collectives'].values()
  )
  return (
      f['size'], f['topology'],
      ' x '.join(str(n) for n in f['mesh'].values()),
      f['gather'], f'{f["batch_size"]} x {f["length"]}', f['trained'],
      f['moments'], f['compiler'],
      *(_gb(parts[p]) for p in ('weights', 'optimizer', 'teacher')),
      _gb(memory and _beside(f)), _gb(f['needed_bytes']), _spare(f),
      _gb(sent), _tera(f['flops']),
      _seconds(f['link_seconds']), *_times(f, 'best'),
      *_times(f, 'estimated'),
  )


def table(plans: Iterable[Mapping[str, Any]]) -> sheets.Sheet:
  """Many plans, a row each."""
  return sheets.Sheet(
      'Of one device: memory in GB, GB sent to other devices and TFLOP of '
      'products in a step. Seconds are of a step, hours of all steps.',
      COLUMNS, [row(f) for f in plans], left=_WORDS,
  )


def _memory(f, title):
  memory, parts = f['memory_bytes'], f['arguments_bytes']
  rows = [
      ('student, whatever it is made of', _gb(parts['weights'])),
      ('optimizer', _gb(parts['optimizer'])),
      ('teacher', _gb(parts['teacher'])),
      ('batch', _gb(parts['batch'])),
  ]
  notes = []
  if memory is None:
    notes.append(f'The compiler gave up: {f["refusal"]}')
  else:
    rows.append(('temporaries, results, code, padding', _gb(_beside(f))))
  rows += [
      ('needed', _gb(f['needed_bytes'])),
      (f'{f["device"]["name"]} has', _gb(f['device']['memory_bytes'])),
      ('left over', _spare(f)),
  ]
  if not f['compiler'].startswith('libtpu'):
    notes.append(
        'Arguments are exact. Temporaries are those of the compiler for CPUs, '
        'which computes some of bfloat16 in float32: a stand-in.'
    )
    notes.append(
        'JAX takes 75 % of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says '
        'otherwise, such as 0.95.'
    )
  return sheets.Sheet(title, ('GB of one device', ''), rows, tuple(notes))


def _moved(f):
  rows = [
      (kind, f'{c["runs"]:,.0f}', _gb(c['whole_bytes']), _gb(c['sent_bytes']))
      for kind, c in f['collectives'].items()
  ]
  notes = []
  if f['unknown_loops']:
    notes.append(
        f'Counted once, since their length is unknown: the loops '
        f'{", ".join(f["unknown_loops"])}.'
    )
  return sheets.Sheet(
      'What one device exchanges in a step, in GB: the arrays that go round '
      '(gathered, or to be reduced) and what it sends if every algorithm is a '
      'ring.',
      ('collective', 'runs', 'arrays', 'sent'),
      rows or [('none', '0', tables.ABSENT, tables.ABSENT)], tuple(notes),
  )


def _time(f):
  rows = [
      ('products at the peak', _seconds(f['product_seconds']), '', ''),
      ('main memory at its bandwidth', _seconds(f['memory_seconds']), '', ''),
      ('links at their bandwidth', _seconds(f['link_seconds']), '', ''),
      ("the compiler's cycles", _seconds(f['cycle_seconds']), '', ''),
      ('step at best: all at once', *_times(f, 'best')),
      ('step estimated: cycles, then links', *_times(f, 'estimated')),
  ]
  share = f['model_flops'] / f['devices'] / f['flops']
  return sheets.Sheet(
      f'{f["flops"] / 1e12:,.2f} TFLOP a device and step, of which the model '
      f'asks for {tables.percent(share)}; hours are for {f["steps"]:,} steps.',
      ('seconds', '', 'MFU', 'hours'), rows,
  )


def _beside(f):
  """What the compiler wants on top of the described arguments."""
  return f['needed_bytes'] - sum(f['arguments_bytes'].values())


def _times(f, kind):
  seconds, mfu, hours = (
      f[f'{kind}_{what}'] for what in ('seconds', 'mfu', 'hours')
  )
  return (
      _seconds(seconds), tables.percent(mfu),
      tables.ABSENT if hours is None else f'{hours:.1f}',
  )


def _seconds(value):
  return tables.ABSENT if value is None else f'{value:.3f}'


def _gb(value):
  return tables.ABSENT if value is None else f'{value / 1e9:.2f}'


def _tera(value):
  return tables.ABSENT if value is None else f'{value / 1e12:.1f}'


def _spare(f):
  spare = f['spare_bytes']
  if spare is None:
    return 'does not fit'
  return _gb(spare) if spare >= 0 else f'{spare / 1e9:.2f}: does not fit'
