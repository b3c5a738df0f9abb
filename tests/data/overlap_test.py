"""Overlap: exact at its threshold, and removal leaves nothing behind."""

import numpy as np

from gemma_qat.data import overlap


def _text(length, seed):
  rng = np.random.default_rng(seed)
  return ''.join(rng.choice(list('abcdefghij'), size=length))


def test_spans_of_200_characters_are_found_and_of_199_are_not():
  held_out = _text(3000, seed=0)
  spans = overlap.HeldOut([held_out])
  for start in (0, 1, 777, 2800):
    for length, expected in ((200, True), (199, False)):
      # '#' occurs nowhere: the shared span cannot grow by chance.
      train = f'{_text(500, 1)}#{held_out[start : start + length]}#tail'
      assert (spans.find(train) is not None) == expected


def test_a_found_span_is_in_both_texts():
  held_out = _text(1000, seed=0)
  train = _text(400, seed=1) + held_out[300:700] + _text(400, seed=2)
  found = overlap.HeldOut([held_out]).find(train)
  assert len(found) == 200 and found in held_out and found in train


def test_unlike_texts_share_nothing():
  spans = overlap.HeldOut(_text(5000, seed) for seed in range(20))
  assert all(spans.find(_text(5000, seed)) is None for seed in range(20, 40))
  # Texts of one repeated character differ only in that character.
  assert overlap.HeldOut(['a' * 500]).find('b' * 500) is None


def test_nothing_held_out_shares_nothing():
  assert overlap.HeldOut([]).find(_text(300, 0)) is None


def test_removal_drops_only_the_paragraphs_that_are_shared():
  own, shared = [_text(300, s) for s in range(4)], _text(260, 9)
  train = '\n\n'.join([own[0], own[1], f'x {shared} y', own[2], own[3]])
  (clean,) = overlap.remove_overlap([train], [f'before {shared} after'])
  assert clean == '\n\n'.join(own)


def test_removal_sees_spans_across_paragraphs():
  short = [_text(120, s) for s in range(6)]
  held_out = ' '.join(short[1:4])
  train = '\n\n'.join(short)
  (clean,) = overlap.remove_overlap([train], [held_out])
  assert clean == '\n\n'.join([short[0], short[4], short[5]])
  assert overlap.HeldOut([held_out]).find(clean) is None


def test_removal_leaves_no_span_even_where_paragraphs_come_together():
  # Without the middle paragraph, the outer ones join to a held-out text.
  a, b, c = _text(150, 0), _text(250, 1), _text(150, 2)
  held_out = [b, f'{a} {c}']
  (clean,) = overlap.remove_overlap([f'{a}\n\n{b}\n\n{c}'], held_out)
  assert overlap.HeldOut(held_out).find(clean) is None


def test_untouched_texts_come_back_unchanged():
  train = ['  odd\n\n\n\n  layout \n' + _text(300, 0), '']
  assert overlap.remove_overlap(train, [_text(300, 1)]) == train


def test_wide_characters_are_characters():
  held_out = '\u65e5\U0001f600\u0101' * 100
  assert overlap.HeldOut([held_out]).find(held_out[3:250]) is not None
