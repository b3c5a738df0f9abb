"""Is the page whole, valid, escaped, and content with itself?"""

import base64
from html import parser

from gemma_qat.reporting import comparison
from gemma_qat.reporting import page
from gemma_qat.reporting import points
from tests.reporting import sample_points

_VOID = {'meta', 'link', 'img', 'br', 'hr'}
_PNG = b'\x89PNG\r\n\x1a\nand so on'


class _Reader(parser.HTMLParser):
  """Notes tags, attributes and texts; fails where tags do not nest."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.open, self.texts = [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in _VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)

  def all(self, tag):
    return [a for t, a in self.tags if t == tag]


def _render(some=None, images=None):
  made = comparison.make(points.group(some or sample_points.sweep()))
  images = images or {'heldout': _PNG, 'size': _PNG}
  return made, page.render(made, images)


def test_tags_nest_and_every_cell_stands_in_the_table():
  made, text = _render()
  read = _Reader(text)
  assert text.startswith('<!DOCTYPE html>')
  assert read.all('html') == [{'lang': 'en'}]
  assert len(read.all('title')) == len(read.all('h1')) == 1
  rows = [
      row for table in (made.results, made.unfinished)
      for row in (table.columns, *table.rows)
  ]
  assert {cell for row in rows for cell in row} <= set(read.texts)
  assert len(read.all('td')) + len(read.all('th')) == sum(map(len, rows))


def test_pictures_lie_in_the_page_with_a_text_in_their_place():
  read = _Reader(_render()[1])
  assert len(read.all('img')) == 2
  for image in read.all('img'):
    kind, data = image['src'].split(',')
    assert kind == 'data:image/png;base64'
    assert base64.b64decode(data) == _PNG
    assert image['alt']


def test_nothing_is_asked_of_a_server_and_no_script_runs():
  _, text = _render()
  read = _Reader(text)
  assert not read.all('script')
  for _, attributes in read.tags:
    for name in ('src', 'href'):
      assert attributes.get(name, 'data:').startswith('data:')
  assert 'url(' not in text and '@import' not in text
  assert any("default-src 'none'" in m.get('content', '')
             for m in read.all('meta'))


def test_it_fits_a_phone_and_both_schemes():
  _, text = _render()
  assert 'width=device-width' in text
  assert 'color-scheme: light dark' in text
  assert 'prefers-color-scheme: dark' in text
  assert 'overflow-x: auto' in text


def test_what_strangers_wrote_is_text_and_not_markup():
  evil = '<img src=x onerror=alert(1)>'
  some = [sample_points.point(evil, quant__start='"><script>'),
          sample_points.point('b')]
  _, text = _render(some)
  read = _Reader(text)
  assert evil in read.texts
  assert not read.all('script') and len(read.all('img')) == 2
