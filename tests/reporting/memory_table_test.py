"""The tables hold the computed figures and stay readable."""

import re

import pytest

from gemma_qat import errors
from gemma_qat.model import config as model_config
from gemma_qat.reporting import gpus
from gemma_qat.reporting import memory
from gemma_qat.reporting import memory_detail
from gemma_qat.reporting import memory_table
from gemma_qat.reporting import published
from gemma_qat.reporting import sheets
from gemma_qat.reporting import storage


def _cells(sheet, *first):
  return next(r for r in sheet.rows if r[: len(first)] == first)[len(first):]


def test_overview_has_every_line_and_every_published_figure():
  weights, beside, *_ = memory_table.overview()
  for layout, embedding in memory_table.LINES:
    for size, cell in zip(
        memory.SIZES, _cells(weights, layout, embedding), strict=True
    ):
      found = storage.weights(model_config.variant(size), layout, embedding)
      assert float(cell) == pytest.approx(found.tensors / 1e9, rel=0.01)
  for recipe in published.RECIPES.values():
    sheet = beside if recipe.layout is None else weights
    row = next(r for r in sheet.rows if r[0].strip() == recipe.title)
    assert [float(c) for c in row[-4:]] == list(recipe.figures.values())


@pytest.mark.parametrize('card', [None, gpus.parse('8GB')])
def test_everything_fits_a_terminal_of_100_columns(card):
  use = memory.Use(vision=True)
  parts = memory_table.overview(use=use, card=card)
  parts += memory_detail.detail(
      memory.estimate(model_config.variant('27b'), use=use), use, card
  )
  text = sheets.set_plain(parts)
  assert max(map(len, text.splitlines())) <= 100
  assert '\x1b' not in text


def test_a_card_holds_what_the_table_says():
  use, card = memory.Use(context=16_384), gpus.parse('8GB')
  sheet = memory_table.overview(use=use, card=card)[2]
  cells = dict(zip(memory.SIZES, _cells(sheet, 'q4_0', 'q4_0')))
  assert cells['27b'] == 'no'
  assert re.fullmatch(r'no \(\d+k\)|no', cells['12b'])
  assert cells['270m'] == cells['1b'] == '32k'
  for size in ('1b', '27b'):
    found = memory.estimate(
        model_config.variant(size), 'q4_0', 'q4_0', use
    )
    assert (found.total <= card.num_bytes) == (size == '1b')


def test_smallest_card_holds_the_total():
  sheet = memory_table.overview()[2]
  for (layout, embedding, *cells) in sheet.rows:
    for size, cell in zip(memory.SIZES, cells):
      found = memory.estimate(model_config.variant(size), layout, embedding)
      assert found.total <= int(cell) * gpus.GIB
      smaller = [g for g in gpus.COMMON if g < int(cell)]
      assert not smaller or found.total > smaller[-1] * gpus.GIB


def test_a_size_without_the_context_has_no_figure():
  use = memory.Use(context=65_536)
  _, beside, cards, _ = memory_table.overview(use=use)
  assert _cells(beside, 'KV cache, f16')[:2] == ('-', '-')
  assert _cells(cards, 'int4', 'int4')[:2] == ('-', '-')
  assert {e.config.variant for e in memory_table.estimates(use=use)} == {
      '4b', '12b', '27b'
  }


def test_q6_k_is_a_dash_where_the_width_forbids_it_and_a_note_says_why():
  weights = memory_table.overview(embedding='q6_k')[0]
  assert _cells(weights, 'q4_0', 'q6_k')[:2] == ('-', '-')
  assert '-' not in _cells(weights, 'q4_0', 'q6_k')[2:]
  assert 'multiple of 256' in ' '.join(weights.notes)


def test_the_parts_of_one_model_add_up():
  use = memory.Use(vision=True)
  found = memory.estimate(model_config.variant('4b'), use=use)
  parts, _ = memory_detail.detail(found, use)
  *some, total = (float(row[2]) for row in parts.rows)
  assert sum(some) == pytest.approx(total, abs=0.02)
  assert total == pytest.approx(found.total / 1e9, abs=0.005)


@pytest.mark.parametrize('given, words', [
    ({'size': '2b'}, "'2b'"), ({'layout': 'q9'}, "'q9'"),
    ({'embedding': 'zz'}, "'zz'.*q8_0"),
    ({'layout': 'w4a16', 'embedding': 'q4_0'}, "w4a16.*'q4_0'.*bf16"),
    ({'size': '1b', 'use': memory.Use(vision=True)}, 'no vision tower'),
    ({'use': memory.Use(context=200_000)}, 'No size.*200,000'),
    ({'use': memory.Use(kv='q3')}, "'q3'"),
])
def test_what_is_not_known_is_refused(given, words):
  with pytest.raises(errors.UserError, match=words):
    memory_table.estimates(**given)


def test_markdown_has_the_same_cells():
  parts = memory_table.overview()
  text = sheets.set_markdown(parts, 'Memory')
  assert text.startswith('# Memory\n')
  for sheet in parts:
    for row in sheet.rows:
      assert '| ' + ' | '.join(row) + ' |' in text
    for note in sheet.notes:
      assert f'- {note}' in text
