"""How does text become Gemma's token ids, exactly as in llama.cpp?

A GGUF holds a vocabulary as three arrays (pieces, scores, types); a
tokenizer.model holds the same as a SentencePiece BPE proto. `Tokenizer` keeps
the GGUF view, because that is what our files carry, and encodes through a
proto rebuilt from it.
"""

import dataclasses
import functools
import hashlib
import json
import numbers
import re
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

from gemma_qat import errors
from gemma_qat.data import vocabulary

_IDS = ('bos_id', 'eos_id', 'pad_id', 'unk_id')
_MAGIC = b'gemma-qat tokenizer 1\n'
# Gemma's has 12 MB of JSON. zlib could make a thousand times as much of a file,
# and Python 24 times as much of that: an empty list is 3 characters, 72 bytes.
_LARGEST_JSON = 24_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A Gemma vocabulary, frozen, and its encoder.

  Build it with `from_pieces`, `from_proto`, `from_bytes` or `tiny_tokenizer`.

  Attributes:
    pieces: V strings as in a GGUF: spaces are U+2581 in NORMAL pieces, but
      real spaces in USER_DEFINED ones.
    scores: [V] float32, read-only; a merge with a higher score comes first.
    types: [V] int32, read-only, GGUF numbers (`vocabulary`).
    end_of_turn_id: The id of '<end_of_turn>', None if there is none.
    chat_template: The Jinja template of an instruction-tuned model, or None.

  Invariants: pieces are unique; the ids lie in [0, V).
  """

  pieces: tuple[str, ...] = dataclasses.field(repr=False)
  scores: np.ndarray = dataclasses.field(repr=False)
  types: np.ndarray = dataclasses.field(repr=False)
  bos_id: int
  eos_id: int
  pad_id: int
  unk_id: int
  end_of_turn_id: int | None
  chat_template: str | None = dataclasses.field(repr=False)
  _processor: sentencepiece.SentencePieceProcessor = dataclasses.field(
      init=False, repr=False
  )

  def __post_init__(self):
    _check(self)
    self.scores.setflags(write=False)
    self.types.setflags(write=False)
    processor = sentencepiece.SentencePieceProcessor()
    try:
      processor.LoadFromSerializedProto(self.to_proto())
    except (RuntimeError, OSError) as error:
      raise errors.UserError(
          f'SentencePiece refuses this vocabulary: {error}'
      ) from error
    object.__setattr__(self, '_processor', processor)

  @property
  def vocab_size(self) -> int:
    return len(self.pieces)

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of pieces and types: equal digests encode text equally."""
    text = json.dumps([self.pieces, self.types.tolist()])
    return hashlib.sha256(text.encode()).hexdigest()

  def encode(
      self, text: str, bos: bool = False, specials: bool = False
  ) -> np.ndarray:
    """Returns the ids of a text, [L] int32.

    Args:
      text: Any string. U+2581 is read as a space; beside a real space it may
        give other ids than llama.cpp, which joins only real ones to runs
        (one such text in 1.2 million tokens, nothing else differed). Lone
        surrogates, which have no UTF-8, become U+FFFD.
      bos: Whether to begin with `bos_id`.
      specials: Whether '<start_of_turn>' and the other CONTROL pieces in the
        text mean the token (a chat prompt), or only these characters (text
        from outside, the default, as in llama.cpp without parse_special).
    """
    ids = [self.bos_id] if bos else []
    text = _without_surrogates(text)
    if not specials:
      return np.array(ids + self._processor.EncodeAsIds(text), np.int32)
    # A split at a pattern with one group alternates text and special pieces.
    for i, part in enumerate(self._control_pattern.split(text)):
      if i % 2:
        ids.append(self._control_ids[part])
      else:
        ids += self._processor.EncodeAsIds(part)
    return np.array(ids, np.int32)

  def encode_all(
      self, texts: Sequence[str], threads: int = -1
  ) -> list[np.ndarray]:
    """Returns `encode(text)` of each text, on all cores by default."""
    encoded = self._processor.EncodeAsIds(
        [_without_surrogates(text) for text in texts], num_threads=threads
    )
    return [np.array(ids, np.int32) for ids in encoded]

  def decode(self, ids: Iterable[int], specials: bool = False) -> str:
    """Returns the text of ids.

    CONTROL pieces vanish, or, with `specials`, stand in it as '<end_of_turn>'.
    """
    ids = np.asarray(ids, np.int64)
    # tolist: SentencePiece takes Python integers only.
    if not specials:
      return self._processor.DecodeIds(ids.tolist())
    text, start = '', 0
    for at in np.flatnonzero(self.types[ids] == vocabulary.CONTROL).tolist():
      text += self._processor.DecodeIds(ids[start:at].tolist())
      text += self.pieces[ids[at]]
      start = at + 1
    return text + self._processor.DecodeIds(ids[start:].tolist())

  def to_proto(self) -> bytes:
    """Returns the bytes of a tokenizer.model."""
    ids = {n: getattr(self, n) for n in _IDS}
    return vocabulary.make_proto(
        self.pieces, self.scores.tolist(), self.types.tolist(), ids
    )

  def to_bytes(self) -> bytes:
    """Returns the whole tokenizer, without pickle, for `from_bytes`.

    A magic line, then zlib over JSON; the scores are exact, because every
    float32 is a float64 and JSON writes those in full.
    """
    fields = {f.name: getattr(self, f.name) for f in _stored_fields()}
    fields['scores'] = self.scores.tolist()
    fields['types'] = self.types.tolist()
    return _MAGIC + zlib.compress(json.dumps(fields).encode())

  @functools.cached_property
  def _control_ids(self) -> dict[str, int]:
    ids = np.flatnonzero(self.types == vocabulary.CONTROL).tolist()
    return {self.pieces[i]: i for i in ids}

  @functools.cached_property
  def _control_pattern(self) -> re.Pattern[str]:
    longest_first = sorted(self._control_ids, key=len, reverse=True)
    return re.compile(f'({"|".join(map(re.escape, longest_first))})')


def from_pieces(
    pieces: Iterable[str],
    scores: Iterable[float],
    types: Iterable[int],
    *,
    bos_id: int = 2,
    eos_id: int = 1,
    pad_id: int = 0,
    unk_id: int = 3,
    chat_template: str | None = None,
) -> Tokenizer:
  """Builds a tokenizer from the arrays and ids of a GGUF.

  Raises:
    UserError: The arrays do not form a vocabulary.
  """
  pieces = tuple(pieces)
  turn = '<end_of_turn>'
  return Tokenizer(
      pieces=pieces,
      scores=_numbers(scores, np.float32),
      types=_numbers(types, np.int32),
      bos_id=bos_id,
      eos_id=eos_id,
      pad_id=pad_id,
      unk_id=unk_id,
      end_of_turn_id=pieces.index(turn) if turn in pieces else None,
      chat_template=chat_template,
  )


def from_proto(data: bytes, chat_template: str | None = None) -> Tokenizer:
  """Builds a tokenizer from the bytes of a tokenizer.model.

  Raises:
    UserError: Not a SentencePiece BPE model, or not one of Gemma's kind.
  """
  pieces, scores, types, ids = vocabulary.read_proto(data)
  return from_pieces(pieces, scores, types, **ids, chat_template=chat_template)


def from_bytes(data: bytes) -> Tokenizer:
  """Reads what `Tokenizer.to_bytes` wrote.

  Raises:
    UserError: The bytes are not a tokenizer, or damaged.
  """
  try:
    if not data.startswith(_MAGIC):
      raise ValueError('no magic line')
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(data[len(_MAGIC) :], _LARGEST_JSON)
    if not unpacker.eof:
      raise ValueError('cut off or too large')
    fields = json.loads(text)
    fields['pieces'] = tuple(fields['pieces'])
    fields['scores'] = _numbers(fields['scores'], np.float32)
    fields['types'] = _numbers(fields['types'], np.int32)
    return Tokenizer(**fields)
  except (
      ValueError, TypeError, KeyError, RecursionError, zlib.error
  ) as error:
    raise errors.UserError(
        f'The stored tokenizer ({len(data)} bytes) is damaged or of another '
        f'version ({error}): restore it from the original checkpoint.'
    ) from error


def tiny_tokenizer(vocab_size: int = 512) -> Tokenizer:
  """Builds the small tokenizer of the `tiny` variant, without any file.

  Raises:
    UserError: `vocab_size` is below 361 or above 10,000.
  """
  return from_pieces(*vocabulary.tiny_pieces(vocab_size))


def _stored_fields() -> list[dataclasses.Field]:
  return [f for f in dataclasses.fields(Tokenizer) if f.init]


def _without_surrogates(text: str) -> str:
  try:
    text.encode()
    return text
  except UnicodeEncodeError:
    # surrogatepass keeps the halves of a pair together, so that they decode
    # to the character that they mean; what is lone is replaced.
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def _numbers(values, dtype) -> np.ndarray:
  """Makes an array of what a file says, which may be anything."""
  try:
    with np.errstate(over='ignore', invalid='ignore'):
      return np.array(values, dtype)
  except (ValueError, TypeError, OverflowError) as error:
    raise errors.UserError(
        'The tokenizer has scores or types that are no numbers: the file is '
        'damaged.'
    ) from error


def _check(tokenizer: Tokenizer) -> None:
  size = len(tokenizer.pieces)
  if size > vocabulary.MOST_PIECES:
    raise errors.UserError(
        f'The tokenizer has {size:,} pieces, more than any: the file is '
        'damaged.'
    )
  texts = list(tokenizer.pieces)
  if tokenizer.chat_template is not None:
    texts.append(tokenizer.chat_template)
  if not all(isinstance(text, str) for text in texts):
    raise errors.UserError(
        'The tokenizer has a piece or chat template that is no text: the file '
        'is damaged.'
    )
  try:
    ''.join(texts).encode()
  except UnicodeEncodeError as error:
    raise errors.UserError(
        'The tokenizer has a piece or chat template that is no Unicode '
        f'({error.reason}): the file is damaged.'
    ) from error
  if tokenizer.scores.shape != (size,) or tokenizer.types.shape != (size,):
    raise errors.UserError(
        f'The tokenizer has {size} pieces, but {tokenizer.scores.size} scores '
        f'and {tokenizer.types.size} types: the file is damaged.'
    )
  if not np.isfinite(tokenizer.scores).all():
    raise errors.UserError(
        'The tokenizer has scores that are NaN or infinite: the file is '
        'damaged.'
    )
  if len(set(tokenizer.pieces)) != size:
    raise errors.UserError(
        'The tokenizer holds some piece twice: the file is damaged.'
    )
  wrong = set(tokenizer.types.tolist()) - set(range(1, 7))
  if wrong:
    raise errors.UserError(
        f'The tokenizer has a piece of type {min(wrong)}, but types are 1 to '
        '6: the file is damaged.'
    )
  ids = {name: getattr(tokenizer, name) for name in _IDS}
  if tokenizer.end_of_turn_id is not None:
    ids['end_of_turn_id'] = tokenizer.end_of_turn_id
  for name, i in ids.items():
    is_whole = isinstance(i, numbers.Integral) and not isinstance(i, bool)
    if not is_whole or not 0 <= i < size:
      raise errors.UserError(
          f'The tokenizer has {name} = {i!r:.60}, which is outside its {size} '
          'pieces: give a Gemma tokenizer.'
      )
