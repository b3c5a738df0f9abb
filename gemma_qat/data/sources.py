"""Where do the documents of a run come from?

A source is a config string:

  docstrings            docstrings and comments of the installed packages
  readmes               their descriptions, licences and help pages
  python_docs           both: the default training text, no download
  topics                Python's language reference: the default held-out text
  files:GLOB            text files, one document each
  jsonl:PATH            one JSON object a line: its field `text`
  hf:NAME[:SPLIT]       a data set of the Hugging Face hub (split: train)

`#field=NAME` chooses the field of jsonl and hf, `#limit=N` ends after N
documents, `#config=NAME` chooses the configuration of a hf data set; join
options with `&`. Several sources are joined with ' + '.
"""

import dataclasses
import glob
import hashlib
import json
import pathlib
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence

from gemma_qat import errors
from gemma_qat.data import installed
from gemma_qat.data import overlap
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
    for name, text in _read(part.strip()):
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


def _read(source: str) -> Iterator[tuple[str, str]]:
  """Yields (name, text) of one source."""
  if source == 'python_docs':
    yield from installed.docstrings()
    yield from installed.readmes()
    return
  if source in ('docstrings', 'readmes', 'topics'):
    yield from getattr(installed, source)()
    return
  kind, _, rest = source.partition(':')
  if kind == 'files' and rest:
    yield from _read_files(rest)
  elif kind == 'jsonl' and rest:
    where, options = _options(source, rest, ('field', 'limit'))
    yield from _read_jsonl(where, **options)
  elif kind == 'hf' and rest:
    where, options = _options(source, rest, ('field', 'limit', 'config'))
    name, _, part = where.partition(':')
    yield from _read_hub(name, part or 'train', **options)
  else:
    raise errors.UserError(
        f'Unknown text source {source!r}: use python_docs, docstrings, '
        'readmes, topics, files:GLOB, jsonl:PATH or hf:NAME.'
    )


def _options(source: str, rest: str, known: tuple[str, ...]):
  where, _, fragment = rest.partition('#')
  options = dict(urllib.parse.parse_qsl(fragment, keep_blank_values=True))
  wrong = sorted(set(options) - set(known))
  limit = options.get('limit', '1')
  if wrong or (fragment and not options) or not limit.isdigit():
    raise errors.UserError(
        f'The text source {source!r} has wrong options after "#": use '
        f'{", ".join(known)} as in #field=text, and a whole number as limit.'
    )
  if 'limit' in options:
    options['limit'] = int(limit)
  return where, options


def _read_files(pattern: str) -> Iterator[tuple[str, str]]:
  matches = sorted(glob.glob(pattern, recursive=True))
  paths = [p for p in map(pathlib.Path, matches) if p.is_file()]
  if not paths:
    raise errors.UserError(
        f'No file matches {pattern!r}: check the pattern of files:GLOB.'
    )
  for path in paths:
    yield path.as_posix(), _file_text(path)


def _file_text(path: pathlib.Path) -> str:
  try:
    return path.read_text('utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
        f'Cannot read {path} as UTF-8 text ({error}): convert it or leave it '
        'out.'
    ) from error


def _read_jsonl(
    path: str, field: str = 'text', limit: int | None = None
) -> Iterator[tuple[str, str]]:
  try:
    lines = open(path, encoding='utf-8-sig')
  except OSError as error:
    raise errors.UserError(
        f'Cannot open {path} ({error.strerror}): check the path of jsonl:PATH.'
    ) from error
  with lines:
    count = 0
    for number, line in enumerate(lines, 1):
      if limit is not None and count == limit:
        return
      if not line.strip():
        continue
      try:
        record = json.loads(line)
      except ValueError as error:
        raise errors.UserError(
            f'{path}, line {number}: not JSON ({error}): repair the line.'
        ) from error
      yield f'{path}:{number}', _field(record, field, f'{path}, line {number}')
      count += 1


def _read_hub(
    name: str,
    part: str,
    field: str = 'text',
    config: str | None = None,
    limit: int | None = None,
) -> Iterator[tuple[str, str]]:
  try:
    import datasets  # pylint: disable=g-import-not-at-top
  except ImportError as error:
    raise errors.UserError(
        f'The source hf:{name} needs the package datasets: '
        'pip install "gemma_qat[datasets]".'
    ) from error
  try:
    # A limited read streams: it fetches no more than it needs.
    records = datasets.load_dataset(
        name, config, split=part, streaming=limit is not None
    )
  except (ValueError, OSError) as error:
    reason = str(error).splitlines()[0]
    raise errors.UserError(
        f'Cannot load split {part!r} of hf:{name} ({reason}): check name, '
        'split and connection.'
    ) from error
  for number, record in enumerate(records):
    if limit is not None and number == limit:
      return
    where = f'hf:{name}:{part}:{number}'
    yield where, _field(record, field, where)


def _field(record, field: str, where: str) -> str:
  text = record.get(field) if isinstance(record, dict) else None
  if not isinstance(text, str):
    raise errors.UserError(
        f'{where} has no text field {field!r}: name the right one with '
        '#field=NAME.'
    )
  return text
