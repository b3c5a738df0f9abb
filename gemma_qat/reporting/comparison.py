"""What do several runs say side by side?

`make` finds the words and figures, `render_markdown` and `page.render` set
them.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import NamedTuple

from gemma_qat.reporting import comparison_columns as columns
from gemma_qat.reporting import markdown
from gemma_qat.reporting import points as points_lib
from gemma_qat.reporting import tables

MARKDOWN, PAGE = 'report.md', 'report.html'
PLOTS = {'heldout': 'heldout.png', 'size': 'size.png'}
CAPTIONS = {
    'heldout': 'Held-out KL divergence against training tokens; a band is one '
               'standard deviation over seeds.',
    'size': 'KL divergence from the base against the size of the file, both '
            'as measured on the finished file.',
}
_TERMS = (
    'The numbers are of the checkpoints named here and of no other. Weights of '
    'Gemma, and models made from them, come under the Gemma Terms of Use: '
    'https://ai.google.dev/gemma/terms'
)


class Table(NamedTuple):
  """Headings and rows of texts; the first column names the row."""

  columns: Sequence[str]
  rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Several runs side by side, in words.

  Attributes:
    title: one line.
    summary: what came out.
    results: of the finished groups.
    unfinished: of the others; may have no rows.
    notes: how it was measured, and what not to conclude.
    terms: of the weights.
  """

  title: str
  summary: str
  results: Table
  unfinished: Table
  notes: Sequence[str]
  terms: str = _TERMS


def make(groups: Sequence[points_lib.Group]) -> Comparison:
  """Sets groups of runs side by side.

  Args:
    groups: from `points.group`.
  """
  finished = [g for g in groups if g.points[0].report is not None]
  others = [g for g in groups if g.points[0].report is None]
  count = sum(len(g.points) for g in finished)
  runs = 'one run' if count == 1 else f'{count} runs'
  return Comparison(
      title=f'Side by side: {runs}'
      + (f' of {len(finished)} configs' if len(finished) != count else ''),
      summary=_summary(finished),
      results=Table(
          (
              'point', 'changes', 'n', *(c.heading for c in columns.COLUMNS),
              'device',
          ),
          [_row(g) for g in finished],
      ),
      unfinished=Table(
          ('point', 'changes', 'state', 'held-out KL so far'),
          [
              (p.name, points_lib.say_changes(g.changes), p.state,
               tables.nats(points_lib.figure(p, 'heldout.last')))
              for g in others for p in g.points
          ],
      ),
      notes=_notes(finished),
  )


def render_markdown(
    comparison: Comparison, plots: Mapping[str, str] | None = None
) -> str:
  """Says a comparison in Markdown.

  Args:
    comparison: from `make`.
    plots: name in CAPTIONS -> image file, relative to the text.
  """
  c = comparison
  parts = [f'# {c.title}', c.summary]
  if c.results.rows:
    parts += ['## Results', _table(c.results)]
  for name, file in (plots or {}).items():
    parts.append(f'![{CAPTIONS[name]}]({file})')
  if c.unfinished.rows:
    parts += ['## Not finished', _table(c.unfinished)]
  if c.notes:
    parts += ['## How to read this', '\n'.join(f'- {n}' for n in c.notes)]
  return '\n\n'.join([*parts, '## Terms', c.terms]) + '\n'


def _table(table):
  """As Markdown; changes as code, for a regex is full of its marks."""
  code = lambda text: text if text == tables.ABSENT else f'`{text}`'
  return markdown.table(table.columns, [
      [code(cell) if column == 'changes' else cell
       for column, cell in zip(table.columns, row)]
      for row in table.rows
  ])


def _row(group):
  devices = dict.fromkeys(p.report['device'] for p in group.points)
  return (
      group.name, points_lib.say_changes(group.changes), str(len(group.points)),
      *(columns.cell(group, c) for c in columns.COLUMNS), ', '.join(devices),
  )


def _summary(finished):
  if not finished:
    return 'No run is finished yet.'
  if len(_ways(finished)) > 1:
    return (
        f'{_model(finished)}. The runs were not all measured in the same way, '
        'so none is called the closest to its base.'
    )
  kld = lambda g: points_lib.mean(g, 'kld.qat')
  best, *others = sorted(finished, key=lambda g: kld(g)[0])
  text = (
      f'{_model(finished)}. Closest to its base is {best.name}, with a KL '
      f'divergence of {tables.nats(kld(best)[0])} nats a token'
  )
  if not others:
    return text + '.'
  second = others[0]
  text += f'; {second.name} follows with {tables.nats(kld(second)[0])}.'
  spreads = [kld(g)[1] for g in (best, second)]
  if None in spreads:
    return text + (
        ' They were not both run with several seeds, so this does not say how '
        'much of the difference is chance.'
    )
  apart = kld(second)[0] - kld(best)[0]
  if apart < max(spreads):
    text += ' The difference is smaller than the spread over seeds.'
  return text


def _model(finished):
  models = dict.fromkeys(g.points[0].report['model'] for g in finished)
  return ', '.join(models)


def _notes(finished):
  reports = [(p.name, p.report) for g in finished for p in g.points]
  if not reports:
    return []
  notes = _measured(finished)
  errors = [r['kld_stderr']['qat'] for _, r in reports]
  notes.append(
      'A figure with ± is the mean over n seeds and their standard deviation '
      '(n - 1). Beside that stands the standard error over tokens, in KLD QAT '
      f'up to {tables.nats(max(errors))}, which runs on the same text share.'
  )
  notes.append(
      'PTQ is the plain rounding of the same tensors to the same formats; won '
      'back is the share of its loss that the trained file does not have.'
  )
  if len({r['device'] for _, r in reports}) > 1:
    notes.append('The devices differ: seconds cannot be compared.')
  if len({str(r.get('git')) for _, r in reports}) > 1:
    notes.append(
        'The runs come from different revisions of the program: '
        + ', '.join(f'{n} {str(r.get("git"))[:9]}' for n, r in reports) + '.'
    )
  return notes


def _measured(finished):
  """How it was measured; a warning where that was not the same for all."""
  ways = _ways(finished)
  if len(ways) == 1:
    return [f'Measured {next(iter(ways))}.']
  return [
      'Not all runs were measured in the same way: compare only figures of '
      'one line of these.',
      *(f'{", ".join(names)}: measured {way}.' for way, names in ways.items()),
  ]


def _ways(finished):
  """Ways of measuring -> names of the runs."""
  ways = {}
  for point in (p for g in finished for p in g.points):
    r = point.report
    way = (
        f'by {r["engine"]} on {r["text"]}, {r["chunks"]} chunks of '
        f'{r["context"]} tokens ({r["tokens_scored"]:,} scored); base: '
        f'{r["base"]}, perplexity {tables.perplexity(r["ppl"]["base"])}'
    )
    ways.setdefault(way, []).append(point.name)
  return ways
