"""What do several runs say side by side?

`make` finds the words and figures, `render_markdown` and `page.render` set
them.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

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
          ('point', 'changes', 'n', *(c.heading for c in _COLUMNS), 'device'),
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


class _Column(NamedTuple):
  heading: str
  path: str
  # (mean) and (spread, mean) -> text.
  write: Callable[..., str]


def _plain(write):
  return lambda value, beside=None: write(value)


def _count(value, beside=None):
  del beside
  return f'{value:,.0f}'


def _share(value, beside=None):
  text = tables.percent(value)
  return text if beside is None else text.removesuffix(' %')


# What matters most first: a screen does not show them all.
_COLUMNS = (
    _Column('KLD won back', 'recovered_kld', _share),
    _Column('PPL won back', 'recovered_ppl', _share),
    _Column('KLD QAT', 'kld.qat', _plain(tables.nats)),
    _Column('PPL QAT', 'ppl.qat', tables.perplexity),
    _Column('top-1 QAT', 'top1.qat', _share),
    _Column('held-out KL, last', 'heldout.last', _plain(tables.nats)),
    _Column('held-out KL, step 0', 'heldout.first', _plain(tables.nats)),
    _Column('KLD PTQ', 'kld.ptq', _plain(tables.nats)),
    _Column('PPL PTQ', 'ppl.ptq', tables.perplexity),
    _Column('top-1 PTQ', 'top1.ptq', _share),
    _Column('steps', 'steps', _count),
    _Column('tokens', 'tokens', _count),
    _Column('seconds', 'seconds', _count),
    _Column('MB', 'bytes.qat', _plain(tables.megabytes)),
)


def _row(group):
  devices = dict.fromkeys(p.report['device'] for p in group.points)
  return (
      group.name, points_lib.say_changes(group.changes), str(len(group.points)),
      *(_cell(group, column) for column in _COLUMNS), ', '.join(devices),
  )


def _cell(group, column):
  mean, spread = points_lib.mean(group, column.path)
  if mean is None:
    return tables.ABSENT
  if not spread:  # One run, or the same figure in all.
    return column.write(mean)
  return f'{column.write(mean)} ± {column.write(spread, mean)}'


def _summary(finished):
  if not finished:
    return 'No run is finished yet.'
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
  notes = _measured(reports)
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
  if len({r.get('git') for _, r in reports}) > 1:
    notes.append(
        'The runs come from different revisions of the program: '
        + ', '.join(f'{n} {str(r.get("git"))[:9]}' for n, r in reports) + '.'
    )
  return notes


def _measured(reports):
  """How it was measured; a warning where that was not the same for all."""
  def say(r: Mapping[str, Any]) -> str:
    return (
        f'by {r["engine"]} on {r["text"]}, {r["chunks"]} chunks of '
        f'{r["context"]} tokens ({r["tokens_scored"]:,} scored); base: '
        f'{r["base"]}, perplexity {tables.perplexity(r["ppl"]["base"])}'
    )
  ways = {}
  for name, report in reports:
    ways.setdefault(say(report), []).append(name)
  if len(ways) == 1:
    return [f'Measured {next(iter(ways))}.']
  return [
      'Not all runs were measured in the same way: compare only figures of '
      'one line of these.',
      *(f'{", ".join(names)}: measured {way}.' for way, names in ways.items()),
  ]
