"""How is a table set with a sentence above it and notes below?"""

from collections.abc import Iterable
import dataclasses
import textwrap

from gemma_qat.reporting import tables

_WIDTH = 88


@dataclasses.dataclass(frozen=True)
class Sheet:
  """Texts to be set: a sentence above, columns, rows, and notes below.

  The first `left` columns are words, the others numbers. Without columns there
  is no table, only what stands around it.
  """

  title: str
  columns: tuple[str, ...]
  rows: list[tuple[str, ...]]
  notes: tuple[str, ...] = ()
  left: int = 1


def set_plain(some: Iterable[Sheet]) -> str:
  """Sets sheets for a terminal."""
  parts = []
  for sheet in some:
    parts.append(textwrap.fill(sheet.title, _WIDTH))
    if sheet.columns:
      parts.append(tables.set_plain(sheet.columns, sheet.rows, sheet.left))
    parts += [
        textwrap.fill(f'- {note}', _WIDTH, subsequent_indent='  ')
        for note in sheet.notes
    ]
    parts.append('')
  return '\n'.join(parts).rstrip()


def set_markdown(some: Iterable[Sheet], heading: str) -> str:
  """Sets sheets as Markdown under a heading."""
  parts = [f'# {heading}']
  for sheet in some:
    parts.append(sheet.title)
    if sheet.columns:
      numbers = len(sheet.columns) - sheet.left
      rule = ['---'] * sheet.left + ['---:'] * numbers
      rows = (sheet.columns, rule, *sheet.rows)
      parts.append('\n'.join(f'| {" | ".join(row)} |' for row in rows))
    if sheet.notes:
      parts.append('\n'.join(f'- {note}' for note in sheet.notes))
  return '\n\n'.join(parts) + '\n'
