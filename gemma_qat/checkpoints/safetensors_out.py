"""How do safetensors files of any size get written without holding them?"""

from collections.abc import Iterable, Sequence
import collections
import contextlib
import json
import os
import pathlib
from typing import NamedTuple
import zlib

import numpy as np

from gemma_qat import errors

WHOLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'

# As safetensors calls them -> bytes a value.
DTYPES = {
    'F32': 4, 'F16': 2, 'BF16': 2, 'I64': 8, 'I32': 4, 'U32': 4, 'U8': 1
}

# Hugging Face's own limit: 5 GB, counted in thousands.
SHARD_BYTES = 5 * 10**9
# Bytes that are read back at a time.
_CHUNK = 2**24


class Tensor(NamedTuple):
  """One tensor to be written: name, dtype as in `DTYPES`, shape."""

  name: str
  dtype: str
  shape: tuple[int, ...]

  @property
  def num_bytes(self) -> int:
    return DTYPES[self.dtype] * int(np.prod(self.shape, dtype=np.int64))


class _Shard(NamedTuple):
  path: pathlib.Path
  tensors: list[Tensor]
  header: bytes
  offsets: dict[str, int]


def write(
    folder: str | os.PathLike,
    tensors: Sequence[Tensor],
    chunks: Iterable[tuple[str, bytes]],
    written_for: str = 'pt',
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, int]:
  """Writes model.safetensors, or numbered shards and their index.

  Every file is read back and compared by CRC-32 with what was written.

  Args:
    folder: exists already.
    tensors: all of them, in file order.
    chunks: (name of a tensor, its next bytes); tensors may take turns, so
      that one pass over a weight can feed several.
    written_for: goes into the files as 'format': 'pt' or 'mlx'.
    shard_bytes: of tensor data in a file; a larger tensor has one of its own.

  Returns:
    Bytes of tensor data by dtype.

  Raises:
    UserError: the disk returns other bytes than it was given.
    ValueError: chunks that are not the tensors that were announced.
  """
  folder = pathlib.Path(folder)
  shards = _plan(folder, tensors, written_for, shard_bytes)
  sums = _write_shards(shards, chunks)
  for shard in shards:
    _verify(shard, sums)
  if len(shards) > 1:
    _write_index(folder, shards)
  totals = collections.Counter()
  for tensor in tensors:
    totals[tensor.dtype] += tensor.num_bytes
  return dict(totals)


def _plan(folder, tensors, written_for, shard_bytes):
  groups, size = [[]], 0
  for tensor in tensors:
    if groups[-1] and size + tensor.num_bytes > shard_bytes:
      groups.append([])
      size = 0
    groups[-1].append(tensor)
    size += tensor.num_bytes
  shards = []
  for i, group in enumerate(groups):
    name = WHOLE if len(groups) == 1 else (
        f'model-{i + 1:05d}-of-{len(groups):05d}.safetensors'
    )
    shards.append(_Shard(folder / name, group, *_header(group, written_for)))
  return shards


def _header(tensors, written_for):
  """Returns length and JSON header, and where each tensor begins."""
  header, offset = {'__metadata__': {'format': written_for}}, 0
  offsets = {}
  for tensor in tensors:
    end = offset + tensor.num_bytes
    header[tensor.name] = {
        'dtype': tensor.dtype, 'shape': list(tensor.shape),
        'data_offsets': [offset, end],
    }
    offsets[tensor.name], offset = offset, end
  text = json.dumps(header).encode()
  # Readers map the file: the data begins at a multiple of 8.
  text += b' ' * (-len(text) % 8)
  text = len(text).to_bytes(8, 'little') + text
  return text, {name: len(text) + at for name, at in offsets.items()}


def _write_shards(shards, chunks):
  """Writes headers and chunks; returns the CRC-32 of each tensor."""
  sizes = {t.name: t.num_bytes for s in shards for t in s.tensors}
  where = {t.name: i for i, s in enumerate(shards) for t in s.tensors}
  done, sums = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
  if len(sizes) != sum(len(s.tensors) for s in shards):
    raise ValueError('Two tensors have the same name.')
  with contextlib.ExitStack() as stack:
    files = [stack.enter_context(open(s.path, 'wb')) for s in shards]
    for file, shard in zip(files, shards):
      file.write(shard.header)
    for name, data in chunks:
      data = memoryview(data).cast('B')
      if done[name] + len(data) > sizes[name]:
        raise ValueError(f'{name} got more than its {sizes[name]} bytes.')
      i = where[name]
      files[i].seek(shards[i].offsets[name] + done[name])
      files[i].write(data)
      done[name] += len(data)
      sums[name] = zlib.crc32(data, sums[name])
  if done != sizes:
    name = next(n for n in sizes if done[n] != sizes[n])
    raise ValueError(f'{name} got {done[name]} of its {sizes[name]} bytes.')
  return sums


def _verify(shard, sums):
  with open(shard.path, 'rb') as f:
    is_same = f.read(len(shard.header)) == shard.header
    for tensor in shard.tensors:
      f.seek(shard.offsets[tensor.name])
      crc, left = 0, tensor.num_bytes
      while left:
        data = f.read(min(left, _CHUNK))
        if not data:
          break
        crc, left = zlib.crc32(data, crc), left - len(data)
      if left or crc != sums[tensor.name] or not is_same:
        raise errors.UserError(
            f'{shard.path}: {tensor.name} does not read back as it was '
            'written: check the disk.'
        )


def _write_index(folder, shards):
  total = sum(t.num_bytes for s in shards for t in s.tensors)
  index = {
      'metadata': {'total_size': total},
      'weight_map': {
          t.name: s.path.name for s in shards for t in s.tensors
      },
  }
  (folder / INDEX).write_text(json.dumps(index, indent=2) + '\n')
