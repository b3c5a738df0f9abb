"""How does a comparison become one file for a browser?

The page needs nothing but itself: styles and pictures lie in it, nothing is
asked of any server, no script runs.
"""

import base64
from collections.abc import Mapping
import html

from gemma_qat.reporting import comparison as comparison_lib

_STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; --soft: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --line: #484848; --soft: #262626; }
}
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 72rem; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; border: 1px solid var(--line);
  border-radius: .4rem; }
table { border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { background: var(--soft); vertical-align: bottom;
  white-space: normal; min-width: 4.5rem; }
tbody tr:last-child > * { border-bottom: 0; }
tr > :first-child { position: sticky; left: 0; text-align: left;
  background: Canvas; white-space: normal; overflow-wrap: anywhere;
  min-width: 5rem; max-width: 9rem; }
thead tr > :first-child { background: var(--soft); }
th.words, td.words { text-align: left; white-space: normal; }
td.words { min-width: 11rem; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; }
img { background: #fff; border-radius: .4rem; height: auto; max-width: 100%; }
figcaption { font-size: .875rem; }
"""
# Columns that hold words, not figures.
_WORDS = ('changes', 'state', 'device')


def render(
    comparison: comparison_lib.Comparison, images: Mapping[str, bytes]
) -> str:
  """Sets a comparison as a page of HTML.

  Args:
    comparison: from `comparison.make`.
    images: name in `comparison.CAPTIONS` -> PNG.
  """
  c = comparison
  e = html.escape
  parts = [f'<h1>{e(c.title)}</h1>', f'<p>{e(c.summary)}</p>']
  if c.results.rows:
    parts += ['<h2>Results</h2>', _table('Results', c.results)]
  parts += [_figure(name, png) for name, png in images.items()]
  if c.unfinished.rows:
    parts += ['<h2>Not finished</h2>', _table('Not finished', c.unfinished)]
  if c.notes:
    items = '\n'.join(f'<li>{e(note)}</li>' for note in c.notes)
    parts += ['<h2>How to read this</h2>', f'<ul>\n{items}\n</ul>']
  parts += ['<h2>Terms</h2>', f'<p>{e(c.terms)}</p>']
  body = '\n'.join(parts)
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{e(c.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _table(name, table):
  e = html.escape
  kinds = [' class="words"' if c in _WORDS else '' for c in table.columns]
  head = ''.join(
      f'<th scope="col"{kind}>{e(c)}</th>'
      for c, kind in zip(table.columns, kinds)
  )
  lines = []
  for first, *rest in table.rows:
    cells = ''.join(
        f'<td{kind}>{e(cell)}</td>' for cell, kind in zip(rest, kinds[1:])
    )
    lines.append(f'<tr><th scope="row">{e(first)}</th>{cells}</tr>')
  rows = '\n'.join(lines)
  # Reached by keyboard, for it scrolls sideways.
  return (
      f'<div class="wide" role="region" aria-label="{e(name)}" tabindex="0">\n'
      f'<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
      '</table>\n</div>'
  )


def _figure(name, png):
  caption = html.escape(comparison_lib.CAPTIONS[name])
  data = base64.b64encode(png).decode('ascii')
  return (
      f'<figure>\n<img src="data:image/png;base64,{data}" alt="{caption}">\n'
      f'<figcaption>{caption}</figcaption>\n</figure>'
  )
