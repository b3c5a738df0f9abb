"""Which figures of runs stand side by side, and how are they written?"""

from collections.abc import Callable
from typing import NamedTuple

from gemma_qat.reporting import points as points_lib
from gemma_qat.reporting import tables


class Column(NamedTuple):
  """A figure by its path in `points.figure`, and how it is written."""

  heading: str
  path: str
  # (mean) and (spread, mean) -> text.
  write: Callable[..., str]


def cell(group: points_lib.Group, column: Column) -> str:
  """Writes a figure of a group: mean ± standard deviation over its seeds."""
  mean, spread = points_lib.mean(group, column.path)
  if mean is None:
    return tables.ABSENT
  if not spread:  # One run, or the same figure in all.
    return column.write(mean)
  return f'{column.write(mean)} ± {column.write(spread, mean)}'


def _plain(write):
  return lambda value, beside=None: write(value)


def _count(value, beside=None):
  del beside
  return f'{value:,.0f}'


def _share(value, beside=None):
  text = tables.percent(value)
  return text if beside is None else text.removesuffix(' %')


# What matters most first: a screen does not show them all.
COLUMNS = (
    Column('KLD won back', 'recovered_kld', _share),
    Column('PPL won back', 'recovered_ppl', _share),
    Column('KLD QAT', 'kld.qat', _plain(tables.nats)),
    Column('PPL QAT', 'ppl.qat', tables.perplexity),
    Column('top-1 QAT', 'top1.qat', _share),
    Column('held-out KL, last', 'heldout.last', _plain(tables.nats)),
    Column('held-out KL, step 0', 'heldout.first', _plain(tables.nats)),
    Column('KLD PTQ', 'kld.ptq', _plain(tables.nats)),
    Column('PPL PTQ', 'ppl.ptq', tables.perplexity),
    Column('top-1 PTQ', 'top1.ptq', _share),
    Column('steps', 'steps', _count),
    Column('tokens', 'tokens', _count),
    Column('seconds', 'seconds', _count),
    Column('MB', 'bytes.qat', _plain(tables.megabytes)),
)
