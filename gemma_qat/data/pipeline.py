"""How do documents become the batches of a run, the same after a restart?

Rows are packed: each is BOS and the next L - 1 tokens of one long stream, in
which a BOS stands between documents. BOS and not EOS, because a text that a
deployed model reads begins with BOS, whereas EOS is never read, only written:
generation ends there. The targets are the teacher's distributions at the same
positions, so nothing is shifted.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence

import grain
import numpy as np

from gemma_qat import errors
from gemma_qat.data import sources
from gemma_qat.data import tokenizer as tokenizer_lib

# Documents encoded between two calls of `progress`.
_CHUNK = 64


def make_dataset(
    documents: Sequence[sources.Document],
    tokenizer: tokenizer_lib.Tokenizer,
    batch_size: int,
    length: int,
    seed: int,
    *,
    weights: Sequence[float] | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    cache_dir: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> grain.DatasetIterator:
  """Returns an endless iterator over shuffled batches.

  Of a mixture, rows of all parts alternate in the proportions of their weights
  (Grain rounds them to a hundredth of the smallest); every part is shuffled and
  repeated for itself.

  Each element is {'tokens': [B, L] int32, 'mask': [B, L] bool}, B being
  `batch_size` / `shard_count`. The mask is False at BOS, which has seen no
  text, and at padding. Every epoch has its own order.

  `get_state` is a JSON-able dict, {'next_index': batches so far}; `set_state`
  continues bit for bit, given the same arguments (compare `digest`). Orbax v1
  saves the iterator itself as a checkpointable. The batch being global, a
  state also holds for another `shard_count`.

  Args:
    documents: The training text.
    tokenizer: Its vocabulary.
    batch_size: Rows of a step over all shards together.
    length: Tokens L of a row, BOS among them.
    seed: Decides the order of the rows.
    weights: Of the parts of a mixture, `sources.weights`; None for one text.
    shard_index: Which of the shards (processes) this one is.
    shard_count: How many shards there are.
    cache_dir: Where to keep the tokens for the next run; None for nowhere.
    progress: Called with (documents done, documents) while encoding.

  Raises:
    UserError: Less text than one batch, or sizes that do not fit together.
  """
  if batch_size % shard_count or not 0 <= shard_index < shard_count:
    raise errors.UserError(
        f'A batch of {batch_size} rows cannot be divided among {shard_count} '
        f'processes (this is {shard_index}): choose a multiple.'
    )
  parts = [documents] if weights is None else [
      [d for d in documents if d.part == i] for i in range(len(weights))
  ]
  rows = [
      _Rows(tokenize(some, tokenizer, cache_dir, progress), tokenizer, length)
      for some in parts
  ]
  _check_rows([len(some) for some in rows], batch_size, length)
  endless = [
      grain.MapDataset.source(some).shuffle(seed=seed + i).repeat()
      for i, some in enumerate(rows)
  ]
  mixed = endless[0] if weights is None else grain.MapDataset.mix(
      endless, weights
  )
  return iter(
      mixed[shard_index::shard_count]
      .batch(batch_size // shard_count, drop_remainder=True)
      # Rows are slices of memory: more than a few ready ones are waste (the
      # default keeps 500 batches and 16 threads).
      .to_iter_dataset(
          grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
      )
  )


def one_epoch(
    documents: Sequence[sources.Document],
    tokenizer: tokenizer_lib.Tokenizer,
    batch_size: int,
    length: int,
    *,
    cache_dir: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> grain.MapDataset:
  """Returns all text once, in order, as a sequence of whole batches.

  For validation: elements as in `make_dataset`; the last batch is filled with
  rows of padding, whose mask is False.
  """
  stream = tokenize(documents, tokenizer, cache_dir, progress)
  rows = _Rows(stream, tokenizer, length, multiple=batch_size)
  return grain.MapDataset.source(rows).batch(batch_size, drop_remainder=True)


def tokenize(
    documents: Sequence[sources.Document],
    tokenizer: tokenizer_lib.Tokenizer,
    cache_dir: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
  """Returns the tokens of all documents, each led by BOS, [T] int32.

  With `cache_dir`, the tokens are kept there in tokens-<digest>.npy.
  """
  path = None
  if cache_dir is not None:
    name = f'tokens-{digest(documents, tokenizer)[:16]}.npy'
    path = pathlib.Path(cache_dir) / name
    cached = _load_cached(path)
    if cached is not None:
      return cached
  bos = np.array([tokenizer.bos_id], np.int32)
  parts = [np.zeros(0, np.int32)]
  for start in range(0, len(documents), _CHUNK):
    some = documents[start : start + _CHUNK]
    for ids in sources.encode(some, tokenizer):
      parts += [bos, ids]
    if progress is not None:
      progress(start + len(some), len(documents))
  stream = np.concatenate(parts)
  if path is not None:
    _save_cached(path, stream)
  return stream


def digest(
    documents: Sequence[sources.Document],
    tokenizer: tokenizer_lib.Tokenizer,
) -> str:
  """Names the tokens of these documents: SHA-256 of texts and vocabulary.

  Keep it beside an iterator's state, which only counts batches: a state is
  worth nothing with other text.
  """
  sha = hashlib.sha256(tokenizer.digest.encode())
  for document in documents:
    raw = document.text.encode('utf-8', 'surrogatepass')
    sha.update(len(raw).to_bytes(8, 'big'))
    sha.update(raw)
    if document.tokens is not None:
      sha.update(b'tokens' + document.tokens.tobytes())
    elif document.has_controls:
      sha.update(b'controls')
  return sha.hexdigest()


def _check_rows(counts, batch_size, length):
  """Refuses text, or a part of a mixture, that is too short."""
  if sum(counts) < batch_size:
    raise errors.UserError(
        f'The text fills {sum(counts)} rows of {length} tokens, fewer than one '
        f'batch of {batch_size}: give more text, or smaller batches.'
    )
  if not all(counts):
    raise errors.UserError(
        f'Part {counts.index(0) + 1} of the mixed text fills no row of '
        f'{length} tokens, for training or held out: give it more text, or '
        'change config.data.heldout_fraction.'
    )


class _Rows:
  """A stream cut into rows: a random-access source for Grain."""

  def __init__(
      self,
      stream: np.ndarray,
      tokenizer: tokenizer_lib.Tokenizer,
      length: int,
      multiple: int = 1,
  ):
    if length < 2:
      raise errors.UserError(
          f'Rows of {length} tokens hold no text beside BOS: use 2 or more.'
      )
    self._stream = stream
    self._bos, self._pad = tokenizer.bos_id, tokenizer.pad_id
    self._length = length
    self._starts = _row_starts(stream, length - 1, self._bos)
    self._count = -(-len(self._starts) // multiple) * multiple

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index) -> dict[str, np.ndarray]:
    tokens = np.full(self._length, self._pad, np.int32)
    if index < len(self._starts):
      start = self._starts[index]
      text = self._stream[start : start + self._length - 1]
      tokens[0] = self._bos
      tokens[1 : 1 + len(text)] = text
    mask = (tokens != self._bos) & (tokens != self._pad)
    return {'tokens': tokens, 'mask': mask}


def _row_starts(stream: np.ndarray, width: int, bos: int) -> np.ndarray:
  """Cuts the stream into rows of `width` tokens that do not begin with BOS.

  A row brings its own BOS; a second one would only cost a position.
  """
  starts, at = [], 0
  is_bos = stream == bos
  while at < len(stream):
    if is_bos[at]:
      at += 1
    else:
      starts.append(at)
      at += width
  return np.array(starts, np.int64)


def _load_cached(path: pathlib.Path) -> np.ndarray | None:
  try:
    return np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError):
    # Not there, or cut short by a full disk: encode again.
    return None


def _save_cached(path: pathlib.Path, stream: np.ndarray) -> None:
  """Writes a cache file that other processes see whole or not at all."""
  partial = path.with_name(f'{path.stem}.{os.getpid()}.partial.npy')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(partial, stream)
    partial.replace(path)
  except OSError as error:
    raise errors.UserError(
        f'Cannot write the token cache {path} ({error.strerror}): choose '
        'another cache folder.'
    ) from error
