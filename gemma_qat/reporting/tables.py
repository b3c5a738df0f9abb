"""How does a measured number look in text?

One way of writing each figure, for the terminal and for Markdown alike.
"""

from collections.abc import Iterable, Sequence
import io

from rich import box
from rich import console as consoles
from rich import table as tables

from gemma_qat.evaluation import protocol

ABSENT = '-'
COLUMNS = (
    'size MB', 'PPL ± stderr', 'KLD mean', 'KLD 99 %', 'top-1 %'
)
# Rich cuts what is wider than its console; a file has no width.
_WIDE = 10_000


def render_table(
    rows: Iterable[tuple[str, int | None, protocol.Fidelity]]
) -> str:
  """Sets the fidelities of some models as a plain table for a terminal.

  Args:
    rows: (name, file size in bytes or None, fidelity) of each model. What a
      model has no figure for, as the base for its KL, stands as a dash.

  Returns:
    Lines without colours; KL is in nats a token.
  """
  return set_plain(('model', *COLUMNS), (
      (
          name, megabytes(size),
          *figures(f.ppl, f.ppl_stderr, f.kld, f.kld_q99, f.top1),
      )
      for name, size, f in rows
  ))


def set_plain(
    columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1
) -> str:
  """Sets texts as a plain table for a terminal.

  Args:
    columns: the headings.
    rows: as many texts each.
    left: how many columns, from the first, are aligned to the left.

  Returns:
    Lines without colours.
  """
  table = tables.Table(box=box.SIMPLE_HEAD, pad_edge=False)
  for i, column in enumerate(columns):
    table.add_column(
        column, justify='left' if i < left else 'right', no_wrap=True
    )
  for row in rows:
    # A name may hold brackets; markup=False below keeps them as they are.
    table.add_row(*row)
  file = io.StringIO()
  console = consoles.Console(
      file=file, width=_WIDE, color_system=None, markup=False, emoji=False,
      highlight=False,
  )
  console.print(table)
  lines = (line.rstrip() for line in file.getvalue().splitlines())
  return '\n'.join(line for line in lines if line)


def figures(
    ppl: float, ppl_stderr: float, kld: float | None, kld_q99: float | None,
    top1: float | None,
) -> tuple[str, str, str, str]:
  """Writes one model's figures, in the order of COLUMNS without the size."""
  return (
      f'{perplexity(ppl)} ± {perplexity(ppl_stderr, ppl)}', nats(kld),
      nats(kld_q99),
      ABSENT if top1 is None else f'{100 * top1:.2f}',
  )


def perplexity(value: float, beside: float | None = None) -> str:
  """Writes a perplexity; without decimals from 10,000 on.

  Args:
    value: a perplexity, or the error of one.
    beside: the perplexity that the error belongs to, whose decimals it takes.
  """
  size = value if beside is None else beside
  return f'{value:,.3f}' if size < 10_000 else f'{value:,.0f}'


def nats(value: float | None) -> str:
  """Writes a KL divergence in nats a token."""
  return ABSENT if value is None else f'{value:.4f}'


def megabytes(size: int | None) -> str:
  """Writes bytes in MB, which are 10^6 bytes."""
  return ABSENT if size is None else f'{size / 1e6:,.1f}'


def percent(share: float | None) -> str:
  """Writes a fraction as a percentage."""
  return ABSENT if share is None else f'{100 * share:.1f} %'


def gigabytes(num_bytes: float) -> str:
  """Writes bytes in GB, three decimals below 1."""
  if not num_bytes:
    return ABSENT
  return f'{num_bytes / 1e9:.{3 if num_bytes < 1e9 else 2}f}'


def tokens(count: int) -> str:
  """Writes a number of tokens in units of 1,024."""
  return f'{count // 1024}k' if count >= 1024 else str(count)
