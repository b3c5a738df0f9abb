"""Where do the documents of a run come from?

`readers` lists the sources that a config can name. Joined with ' + ' they are
one text. Mixed by weight (`0.7*python_docs + 0.3*jsonl:PATH`) they stay parts,
of which training draws its rows in these proportions, however large they are.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from gemma_qat import errors
from gemma_qat.data import overlap
from gemma_qat.data import readers
from gemma_qat.data import tokenizer as tokenizer_lib

# Shorter documents have less than about 50 tokens: mostly separators.
MIN_CHARACTERS = 200


@dataclasses.dataclass(frozen=True)
class Document:
  """One text that is never torn between training and evaluation.

  Attributes:
    name: where it is from.
    text: itself.
    has_controls: whether '<start_of_turn>' and the like in the text are the
      tokens, as every runtime reads a rendered chat, or these characters.
    tokens: ids [L] of the text, without BOS, where they are known: a model
      that writes does not always write as a tokenizer reads. Control tokens
      stand in the text by name.
    part: which part of its source it is from, counted from 0.
  """

  name: str
  text: str
  has_controls: bool = False
  tokens: np.ndarray | None = dataclasses.field(default=None, compare=False)
  part: int = 0

  @property
  def is_plain(self) -> bool:
    """Whether a piece of the text would be a text of its own."""
    return not self.has_controls and self.tokens is None


@dataclasses.dataclass(frozen=True)
class Size:
  """How much text a list of documents holds."""

  documents: int
  characters: int
  tokens: int


def load(
    source: str, min_characters: int = MIN_CHARACTERS
) -> list[Document]:
  """Reads the documents of a source.

  The order is fixed: of the parts as given, then of names (installed text and
  files) or of lines (jsonl, chat, hf). Exact duplicates of an earlier text and
  texts below `min_characters` are left out; a conversation or a sampled text is
  whole, however short, and only left out if it is empty.

  Raises:
    UserError: An unknown source, an unreadable file or line, a missing
      package, weights for some parts only, or no document at all.
  """
  documents, seen = [], set()
  for part, (_, where) in enumerate(_parts(source)):
    for record in readers.read(where):
      document = Document(*record, part=part)
      text = document.text
      digest = hashlib.sha256(text.encode('utf-8', 'replace')).digest()
      fewest = min_characters if document.is_plain else 1
      if len(text) >= fewest and digest not in seen:
        seen.add(digest)
        documents.append(document)
  if not documents:
    raise errors.UserError(
        f'The source {source!r} holds no document of {min_characters} '
        'characters or more: give another source, or longer documents.'
    )
  return documents


def weights(source: str) -> tuple[float, ...] | None:
  """Returns the weights of the parts of a mixture, None for a plain source.

  Raises:
    UserError: a weight of 0, or weights for some parts only.
  """
  found = tuple(weight for weight, _ in _parts(source))
  return None if found[0] is None else found


def load_pair(
    train: str, held_out: str, fraction: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
  """Reads training and held-out documents that share no text.

  The same source for both is split by `split`; of two sources, the training
  side loses what both hold: paragraphs of plain text
  (`overlap.remove_overlap`), all of a conversation or of a sampled text.

  Raises:
    UserError: As `load`; or nothing is left to train on.
  """
  if train == held_out:
    training, evaluation = split(load(train), fraction, seed)
  else:
    training, evaluation = load(train), load(held_out)
  texts = overlap.remove_overlap(
      [d.text for d in training], [d.text for d in evaluation]
  )
  training = [
      dataclasses.replace(d, text=text)
      for d, text in zip(training, texts, strict=True)
      if (len(text) >= MIN_CHARACTERS if d.is_plain else text == d.text)
  ]
  if not training or not evaluation:
    raise errors.UserError(
        f'Training text {train!r} and held-out text {held_out!r} leave '
        f'{len(training)} training and {len(evaluation)} held-out documents '
        'that share no text: give more documents.'
    )
  return training, evaluation


def split(
    documents: Iterable[Document], held_out: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
  """Divides documents into (training, held-out), each in the given order.

  Which side a document falls on depends on its text and the seed alone: not
  on the other documents, nor on its name, so that copies stay together.
  """
  sides = ([], [])
  for document in documents:
    text = ' '.join(document.text.split())
    key = f'{seed}\n{text}'.encode('utf-8', 'replace')
    draw = int.from_bytes(hashlib.sha256(key).digest()[:8], 'big') / 2**64
    sides[draw < held_out].append(document)
  return sides


def check_disjoint(
    train: Iterable[Document], held_out: Sequence[Document]
) -> None:
  """Raises a UserError if training documents share text with held-out ones.

  Shared means an equal document, or 200 equal characters in a row with every
  run of whitespace read as one space. Holds 8 bytes for each character of
  `held_out`, and one training document at a time.
  """
  spans = overlap.HeldOut([d.text for d in held_out])
  for document in train:
    shared = spans.find(document.text)
    if shared is not None:
      raise errors.UserError(
          f'The training document {document.name!r} shares text with the '
          f'held-out documents ({shared[:60]!r} ...): take another source for '
          'one of them, or remove the overlap first.'
      )


def encode(
    documents: Sequence[Document], tokenizer: tokenizer_lib.Tokenizer
) -> list[np.ndarray]:
  """Returns the token ids of each document, without BOS.

  Raises:
    UserError: tokens that a document brings do not say its text in this
      vocabulary.
  """
  plain = iter(tokenizer.encode_all([d.text for d in documents if d.is_plain]))
  return [
      next(plain) if d.is_plain else _special_tokens(d, tokenizer)
      for d in documents
  ]


def measure(
    documents: Sequence[Document], tokenizer: tokenizer_lib.Tokenizer
) -> Size:
  """Counts documents, characters and tokens (without BOS)."""
  ids = encode(documents, tokenizer)
  return Size(
      len(documents), sum(len(d.text) for d in documents), sum(map(len, ids))
  )


# '0.7*python_docs'; no kind of source begins with a figure.
_WEIGHTED = re.compile(r'\s*([0-9.]+(?:e-?[0-9]+)?)\s*\*(.+)', re.DOTALL)


def _parts(source: str) -> list[tuple[float | None, str]]:
  """Cuts a source at ' + '; a weight is None where none was given."""
  parts = []
  for part in source.split(' + '):
    match = _WEIGHTED.fullmatch(part)
    if match is None:
      parts.append((None, part.strip()))
      continue
    try:
      weight = float(match[1])
    except ValueError:
      weight = 0.0
    if not 0 < weight < float('inf'):
      raise errors.UserError(
          f'The text source {source!r} has the weight {match[1]}: give a number '
          'above 0, or leave the part out.'
      )
    parts.append((weight, match[2].strip()))
  if len({weight is None for weight, _ in parts}) > 1:
    raise errors.UserError(
        f'The text source {source!r} has weights for some of its parts only: '
        'give every part one, as in 0.7*python_docs + 0.3*jsonl:PATH, or none.'
    )
  return parts


def _special_tokens(document, tokenizer) -> np.ndarray:
  if document.tokens is None:
    return tokenizer.encode(document.text, specials=True)
  ids = document.tokens
  if ids.max(initial=0) < tokenizer.vocab_size and (
      tokenizer.decode(ids, specials=True) == document.text
  ):
    return ids
  raise errors.UserError(
      f'The {readers.TOKENS} of {document.name} do not say its text in this '
      "model's vocabulary: sample text from a model of the same vocabulary, or "
      'remove the field.'
  )
