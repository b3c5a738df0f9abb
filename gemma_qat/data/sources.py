"""Where do the documents of a run come from?

`readers` lists the sources that a config can name.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

from gemma_qat import errors
from gemma_qat.data import overlap
from gemma_qat.data import readers
from gemma_qat.data import tokenizer as tokenizer_lib

# Shorter documents have less than about 50 tokens: mostly separators.
MIN_CHARACTERS = 200


@dataclasses.dataclass(frozen=True)
class Document:
  """One text that is never torn between training and evaluation."""

  name: str
  text: str


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
  files) or of lines (jsonl, hf). Exact duplicates of an earlier text and texts
  below `min_characters` are left out.

  Raises:
    UserError: An unknown source, an unreadable file or line, a missing
      package, or no document at all.
  """
  documents, seen = [], set()
  for part in source.split(' + '):
    for name, text in readers.read(part.strip()):
      digest = hashlib.sha256(text.encode('utf-8', 'replace')).digest()
      if len(text) >= min_characters and digest not in seen:
        seen.add(digest)
        documents.append(Document(name, text))
  if not documents:
    raise errors.UserError(
        f'The source {source!r} holds no document of {min_characters} '
        'characters or more: give another source, or longer documents.'
    )
  return documents


def load_pair(
    train: str, held_out: str, fraction: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
  """Reads training and held-out documents that share no text.

  The same source for both is split by `split`; of two sources, the training
  side loses what both hold (`overlap.remove_overlap`).

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
      if len(text) >= MIN_CHARACTERS
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


def measure(
    documents: Sequence[Document], tokenizer: tokenizer_lib.Tokenizer
) -> Size:
  """Counts documents, characters and tokens (without BOS)."""
  ids = tokenizer.encode_all([d.text for d in documents])
  return Size(
      len(documents), sum(len(d.text) for d in documents), sum(map(len, ids))
  )
