"""How many rows of an embedding are tokens, and which are only padding?

Files pad the embedding (Hugging Face's 4B and larger to 262,208 rows) and the
vocabulary (llama.cpp's converter with '[PAD...]' pieces); a fine-tune may have
added tokens of its own behind Gemma's 262,144. What is a token stays.
"""

import dataclasses
import re

from gemma_qat import errors
from gemma_qat.checkpoints import names
from gemma_qat.data import tokenizer as tokenizers

PADDED_VOCABULARY = 262_208
# What stands around an image in text, and the marker that stands for it, which
# has no embedding. A vocabulary that is not Gemma's may lack all three: folders
# then declare them behind its last token.
IMAGE_PIECES = {
    'boi_token': '<start_of_image>',
    'eoi_token': '<end_of_image>',
    'image_token': '<image_soft_token>',
}
IMAGE_PIECE = IMAGE_PIECES['image_token']

_PAD_PIECE = re.compile(r'\[PAD\d+\]')
# Embeddings are padded to multiples of 64, 128, 256 ...
_MOST_PADDING = 1_024


def count_tokens(
    source: str, rows: int, tokenizer: tokenizers.Tokenizer | None
) -> int:
  """Returns the size of the vocabulary.

  Args:
    source: for messages.
    rows: of the embedding in the file.
    tokenizer: as it was found, if it was.

  Raises:
    UserError: tokenizer and embedding do not belong together.
  """
  if tokenizer is None:
    is_padded = names.VOCABULARY < rows <= PADDED_VOCABULARY
    return names.VOCABULARY if is_padded else rows
  tokens = _without_padding(tokenizer.pieces)
  if set(tokenizer.pieces[rows:tokens]) <= set(IMAGE_PIECES.values()):
    tokens = min(tokens, rows)
  if tokens > rows or rows - tokens > _MOST_PADDING:
    raise errors.UserError(
        f'{source} has {tokens:,} tokens, but {rows:,} rows in its embedding: '
        'tokenizer and weights do not belong together.'
    )
  return tokens


def cut(
    tokenizer: tokenizers.Tokenizer | None, size: int
) -> tokenizers.Tokenizer | None:
  """Returns the tokenizer without the pieces beyond `size`."""
  if tokenizer is None or tokenizer.vocab_size == size:
    return tokenizer
  return dataclasses.replace(
      tokenizer,
      pieces=tokenizer.pieces[:size],
      scores=tokenizer.scores[:size].copy(),
      types=tokenizer.types[:size].copy(),
  )


def _without_padding(pieces):
  size = len(pieces)
  while size and _PAD_PIECE.fullmatch(pieces[size - 1]):
    size -= 1
  if size == names.VOCABULARY + 1 and pieces[size - 1] == IMAGE_PIECE:
    size -= 1
  return size
