"""Which pieces does a vocabulary hold, as a proto and as a GGUF's arrays?"""

import itertools
import re
import string
from collections.abc import Sequence

from google.protobuf import message
from sentencepiece import sentencepiece_model_pb2

from gemma_qat import errors

# Piece types, numbered as in GGUF (`llama_token_type`). SentencePiece has the
# same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Gemma has 262,144. A damaged file may claim as many as it has pairs of bytes.
MOST_PIECES = 2**20

_SPACE = '\u2581'

# Gemma's tokenizer.model calls these USER_DEFINED (<unk>: UNKNOWN); a correct
# GGUF calls them CONTROL, 6,249 in all, so that plain text never holds them.
_CONTROL_PIECE = re.compile(
    r'<(pad|eos|bos|unk|mask|start_of_turn|end_of_turn|unused\d+)>'
)

# The commonest English letter pairs and words, commonest first: enough merges
# for tiny text to look like text (about 1.6 characters a token).
_PAIRS = (
    'th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng '
    'se ha as ou io le ve co me de hi ri ro ic ne ea ra ce li ch ll be ma si'
).split()
_WORDS = (
    'the of and to in is that for it as with be on not this are or from by '
    'an if at can which one when will all has may only other name type value '
    'returns function object class string number module method default'
).split()


def make_proto(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    ids: dict[str, int],
) -> bytes:
  """Returns the bytes of a tokenizer.model from the arrays of a GGUF.

  Args:
    pieces: V strings, USER_DEFINED ones with real spaces.
    scores: V scores.
    types: V types in GGUF numbers.
    ids: Values of bos_id, eos_id, pad_id and unk_id.
  """
  proto = sentencepiece_model_pb2.ModelProto()
  for i, (piece, score, kind) in enumerate(
      zip(pieces, scores, types, strict=True)
  ):
    if kind == USER_DEFINED:
      # With real spaces the runs of spaces and lines would fall apart:
      # perplexity 37 instead of 15 on the 270M.
      piece = piece.replace(' ', _SPACE)
    # A GGUF may call <unk> CONTROL; SentencePiece wants one UNKNOWN piece.
    kind = UNKNOWN if i == ids['unk_id'] else kind
    proto.pieces.add(piece=piece, score=score, type=kind)
  trainer = proto.trainer_spec
  trainer.model_type = trainer.BPE
  trainer.vocab_size = len(pieces)
  trainer.byte_fallback = True
  for name, i in ids.items():
    setattr(trainer, name, i)
    setattr(trainer, name.replace('_id', '_piece'), pieces[i])
  normalizer = proto.normalizer_spec
  normalizer.name = 'identity'
  normalizer.add_dummy_prefix = False
  normalizer.remove_extra_whitespaces = False
  normalizer.escape_whitespaces = True
  return proto.SerializeToString(deterministic=True)


def read_proto(
    data: bytes,
) -> tuple[list[str], list[float], list[int], dict[str, int]]:
  """Returns what `make_proto` takes, from the bytes of a tokenizer.model.

  Raises:
    UserError: Not a SentencePiece BPE model, or one that changes its text
      (a prefix space, another normaliser), which no Gemma does.
  """
  try:
    proto = sentencepiece_model_pb2.ModelProto.FromString(data)
    if len(proto.pieces) > MOST_PIECES:
      raise ValueError('too many pieces')
    texts = [p.piece for p in proto.pieces]
    # protobuf raises, or gives bytes, where a text is not UTF-8.
    if not all(isinstance(text, str) for text in texts):
      raise ValueError('a piece is no text')
  except (message.DecodeError, ValueError) as error:
    raise errors.UserError(
        f'The tokenizer ({len(data)} bytes) is not a SentencePiece model: '
        'give the tokenizer.model of the checkpoint.'
    ) from error
  trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
  if not proto.pieces or trainer.model_type != trainer.BPE:
    raise errors.UserError(
        f'The tokenizer ({len(data)} bytes) is not a SentencePiece BPE model '
        'with pieces: give the tokenizer.model of a Gemma checkpoint.'
    )
  if (
      normalizer.add_dummy_prefix
      or normalizer.remove_extra_whitespaces
      or normalizer.precompiled_charsmap
  ):
    raise errors.UserError(
        'The tokenizer normalises its text (prefix space, whitespace or '
        'characters), which Gemma does not: give a Gemma tokenizer.model.'
    )
  pieces, types = [], []
  for p, text in zip(proto.pieces, texts):
    is_control = p.type in (USER_DEFINED, UNKNOWN) and (
        _CONTROL_PIECE.fullmatch(text)
    )
    kind = CONTROL if is_control else p.type
    is_plain = kind == USER_DEFINED
    pieces.append(text.replace(_SPACE, ' ') if is_plain else text)
    types.append(kind)
  ids = {
      name: getattr(trainer, name)
      for name in ('bos_id', 'eos_id', 'pad_id', 'unk_id')
  }
  return pieces, [p.score for p in proto.pieces], types, ids


def tiny_pieces(size: int) -> tuple[list[str], list[float], list[int]]:
  """Returns pieces, scores and types of Gemma's structure, made in code.

  Ids 0 to 3 are <pad>, <eos>, <bos>, <unk> as in Gemma; then the turn marks,
  USER_DEFINED runs of spaces and lines, 256 bytes, merges, single characters.

  Raises:
    UserError: `size` is too small for these, or above 10,000.
  """
  characters = [_SPACE, *string.ascii_letters, *string.digits]
  characters += string.punctuation
  specials = '<pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn>'.split()
  runs = ['\n', '\n\n', '  ', ' ' * 4]
  raw = [f'<0x{b:02X}>' for b in range(256)]
  fixed = specials + runs + raw
  smallest = len(fixed) + len(characters)
  if not smallest <= size <= 10_000:
    raise errors.UserError(
        f'A tiny tokenizer cannot have {size} pieces: ask for {smallest} to '
        '10,000.'
    )
  ordered = list(itertools.islice(_merges(), size - smallest)) + characters
  types = (
      [CONTROL] * len(specials)
      + [USER_DEFINED] * len(runs)
      + [BYTE] * len(raw)
      + [NORMAL] * len(ordered)
  )
  # As in Gemma, the scores of merges and characters count down from 0.
  scores = [0.0] * len(fixed) + [-float(i) for i in range(len(ordered))]
  return fixed + ordered, scores, types


def _merges():
  """Yields distinct pieces, each the join of two earlier ones."""
  seen = set()
  words = [_SPACE + w for w in _WORDS]
  # A word is reached through its prefixes: U+2581 t, U+2581 th, ...
  prefixes = (w[:n] for w in words for n in range(2, len(w) + 1))
  letters = string.ascii_lowercase
  pairs = map(''.join, itertools.product(letters, repeat=2))
  triples = map(''.join, itertools.product(letters, repeat=3))
  for piece in itertools.chain(_PAIRS, prefixes, pairs, triples):
    if piece not in seen:
      seen.add(piece)
      yield piece
