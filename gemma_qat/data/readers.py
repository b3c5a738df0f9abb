"""Which texts does a source in a config stand for?

A source is a config string:

  docstrings            docstrings and comments of the installed packages
  readmes               their descriptions, licences and help pages
  python_docs           both: the default training text, no download
  topics                Python's language reference: the default held-out text
  files:GLOB            text files, one document each
  jsonl:PATH            one JSON object a line: its field `text`; what
                        `gemma-qat generate-data` wrote comes back token by
                        token, by the field `gemma_tokens` beside it
  chat:PATH             one conversation a line: `messages`, a list of objects
                        with `role` and `content`, in Gemma's turns
  hf:NAME[:SPLIT]       a data set of the Hugging Face hub (split: train)

`#limit=N` reads no more than N documents; `#field=NAME` chooses the field of
jsonl, chat and hf, `#config=NAME` the configuration of a hf data set; options
are joined with `&`. Several sources are joined with ' + ', or mixed by weight:
`0.7*python_docs + 0.3*jsonl:PATH`, see `sources`.
"""

import glob
import itertools
import json
import pathlib
import urllib.parse
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gemma_qat import errors
from gemma_qat.data import chat
from gemma_qat.data import installed

# Of a jsonl record: the ids of its text in Gemma's vocabulary, without BOS.
TOKENS = 'gemma_tokens'

_INSTALLED = {
    'python_docs': (installed.docstrings, installed.readmes),
    'docstrings': (installed.docstrings,),
    'readmes': (installed.readmes,),
    'topics': (installed.topics,),
}


class Record(NamedTuple):
  """One text as it was read; the fields are those of `sources.Document`."""

  name: str
  text: str
  has_controls: bool = False
  tokens: np.ndarray | None = None


def read(source: str) -> Iterator[Record]:
  """Returns an iterator over the records of one source, not a joined one.

  Raises:
    UserError: Here, an unknown source or option; while iterating, a file,
      line or record that cannot be read, or a missing package.
  """
  source, options = _split_options(source)
  limit = options.pop('limit', None)
  kind, _, where = source.partition(':')
  if kind in _INSTALLED and not where:
    documents = itertools.starmap(
        Record, itertools.chain(*(read() for read in _INSTALLED[kind]))
    )
    allowed = ()
  elif kind == 'files' and where:
    documents, allowed = _read_files(where), ()
  elif kind == 'jsonl' and where:
    allowed = ('field',)
    documents = _read_jsonl(where, options.get('field', 'text'))
  elif kind == 'chat' and where:
    allowed = ('field',)
    documents = _read_chat(where, options.get('field', 'messages'))
  elif kind == 'hf' and where:
    allowed = ('field', 'config')
    documents = _read_hub(where, options, is_limited=limit is not None)
  else:
    raise errors.UserError(
        f'Unknown text source {source!r}: use {", ".join(_INSTALLED)}, '
        'files:GLOB, jsonl:PATH, chat:PATH or hf:NAME.'
    )
  unknown = sorted(set(options) - set(allowed))
  if unknown:
    raise errors.UserError(
        f'The text source {source!r} has no option {unknown[0]!r}: use '
        f'{", ".join(("limit", *allowed))}.'
    )
  return itertools.islice(documents, limit)


def _split_options(source: str) -> tuple[str, dict]:
  source, _, fragment = source.partition('#')
  options = dict(urllib.parse.parse_qsl(fragment, keep_blank_values=True))
  if fragment and not options:
    options = {fragment: ''}
  if 'limit' in options:
    if not options['limit'].isdecimal():
      raise errors.UserError(
          f'The text source {source!r} has limit={options["limit"]}: give a '
          'whole number.'
      )
    options['limit'] = int(options['limit'])
  return source, options


def _read_files(pattern: str) -> Iterator[Record]:
  matches = sorted(glob.glob(pattern, recursive=True))
  paths = [p for p in map(pathlib.Path, matches) if p.is_file()]
  if not paths:
    raise errors.UserError(
        f'No file matches {pattern!r}: check the pattern of files:GLOB.'
    )
  for path in paths:
    yield Record(path.as_posix(), _file_text(path))


def _file_text(path: pathlib.Path) -> str:
  try:
    return path.read_text('utf-8-sig')
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
        f'Cannot read {path} as UTF-8 text ({error}): convert it or leave it '
        'out.'
    ) from error


def _read_jsonl(path: str, field: str) -> Iterator[Record]:
  for name, where, record in _read_lines(path, 'jsonl'):
    text = _field(record, field, where)
    tokens = _tokens(record, where) if field == 'text' else None
    yield Record(name, text, tokens=tokens)


def _tokens(record: dict, where: str) -> np.ndarray | None:
  ids = record.get(TOKENS)
  if ids is None:
    return None
  is_id = lambda i: type(i) is int and 0 <= i < 2**31
  if isinstance(ids, list) and all(map(is_id, ids)):
    return np.array(ids, np.int32)
  raise errors.UserError(
      f'{where} has a field {TOKENS!r} that is no list of token ids: write the '
      'file anew with gemma-qat generate-data, or remove the field.'
  )


def _read_chat(path: str, field: str) -> Iterator[Record]:
  for name, where, record in _read_lines(path, 'chat'):
    messages = record.get(field) if isinstance(record, dict) else None
    yield Record(name, chat.render(messages, where), has_controls=True)


def _read_lines(path: str, kind: str) -> Iterator[tuple[str, str, object]]:
  """Yields (name, place for messages, JSON value) of each line."""
  # Read line by line, but broken UTF-8 only shows in the middle of it.
  try:
    with open(path, encoding='utf-8-sig') as lines:
      for number, line in enumerate(lines, 1):
        if line.strip():
          where = f'{path}, line {number}'
          yield f'{path}:{number}', where, _parse(line, where)
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
        f'Cannot read {path} as UTF-8 text ({error}): check the path of '
        f'{kind}:PATH.'
    ) from error


def _parse(line: str, where: str):
  try:
    return json.loads(line)
  # Python's JSON recurses: a line of a thousand brackets is too deep for it.
  except (ValueError, RecursionError) as error:
    raise errors.UserError(
        f'{where}: not JSON ({error}): repair the line.'
    ) from error


def _read_hub(
    where: str, options: dict, is_limited: bool
) -> Iterator[Record]:
  name, _, part = where.partition(':')
  part = part or 'train'
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
        name, options.get('config'), split=part, streaming=is_limited
    )
  except (ValueError, OSError) as error:
    reason = str(error).splitlines()[0]
    raise errors.UserError(
        f'Cannot load split {part!r} of hf:{name} ({reason}): check name, '
        'split and connection.'
    ) from error
  for number, record in enumerate(records):
    place = f'hf:{name}:{part}:{number}'
    yield Record(place, _field(record, options.get('field', 'text'), place))


def _field(record, field: str, where: str) -> str:
  text = record.get(field) if isinstance(record, dict) else None
  if not isinstance(text, str):
    raise errors.UserError(
        f'{where} has no text field {field!r}: name the right one with '
        '#field=NAME.'
    )
  return text
