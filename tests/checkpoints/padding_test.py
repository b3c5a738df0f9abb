"""A vocabulary has as many tokens as it has, however its files are padded."""

import dataclasses

import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import padding
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.data import vocabulary


@pytest.mark.parametrize(('rows', 'tokens'), [
    (262_144, 262_144), (262_208, 262_144), (262_145, 262_144), (512, 512),
    (300_000, 300_000),
])
def test_without_a_tokenizer_only_the_known_padding_is_dropped(rows, tokens):
  assert padding.count_tokens('x', rows, None) == tokens


def test_with_a_tokenizer_its_tokens_count():
  tiny = tokenizers.tiny_tokenizer(512)
  assert padding.count_tokens('x', 512, tiny) == 512
  assert padding.count_tokens('x', 576, tiny) == 512
  padded = _with(tiny, '<think>', '[PAD513]', '[PAD514]')
  assert padding.count_tokens('x', 515, padded) == 513
  assert padding.cut(padded, 513).pieces == (*tiny.pieces, '<think>')


@pytest.mark.parametrize('rows', [511, 512 + 1_025])
def test_rows_that_do_not_fit_the_tokens_are_refused(rows):
  tiny = tokenizers.tiny_tokenizer(512)
  with pytest.raises(errors.UserError, match='512 tokens.*do not belong'):
    padding.count_tokens('model', rows, tiny)


def test_the_image_marker_counts_only_if_tokens_follow_it():
  tiny = tokenizers.tiny_tokenizer(512)
  full = [f'token {i}' for i in range(512, 262_144)]
  marked = _with(tiny, *full, padding.IMAGE_PIECE)
  assert padding.count_tokens('x', 262_208, marked) == 262_144
  more = _with(tiny, *full, padding.IMAGE_PIECE, '<think>')
  assert padding.count_tokens('x', 262_208, more) == 262_146


def _with(tokenizer, *pieces):
  return dataclasses.replace(
      tokenizer,
      pieces=(*tokenizer.pieces, *pieces),
      scores=np.append(tokenizer.scores, np.zeros(len(pieces), np.float32)),
      types=np.append(
          tokenizer.types,
          np.full(len(pieces), vocabulary.CONTROL, np.int32),
      ),
  )
