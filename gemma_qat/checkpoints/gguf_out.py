"""How do tensors of any size get into a GGUF file without lying in memory?

The header is the gguf package's; the data is appended piece by piece, which
the package would only take whole (the embedding of 27B is 2.8 GB in float16).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import collections
import os
from typing import NamedTuple
import zlib

import gguf
import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import atomic
from gemma_qat.checkpoints import gguf_header

_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
# Read back in pieces of this many bytes.
_READ = 2**26


class Tensor(NamedTuple):
  """What the header says of a tensor; shape outermost axis first."""

  name: str
  shape: tuple[int, ...]
  type: gguf.GGMLQuantizationType
  num_bytes: int


class Written(NamedTuple):
  """num_bytes: of tensor data by GGUF type. checksums: CRC-32 by tensor."""

  num_bytes: dict[str, int]
  checksums: dict[str, int]


def tensor(name: str, shape: Sequence[int], type_name: str) -> Tensor:
  """Describes a tensor of a GGUF type that its rows can have."""
  kind = gguf.GGMLQuantizationType[type_name]
  block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  count = int(np.prod(shape, dtype=np.int64))
  return Tensor(name, tuple(shape), kind, count // block * block_bytes)


def write(
    path: str | os.PathLike,
    architecture: str,
    add_metadata: Callable[[gguf.GGUFWriter], None],
    tensors: Sequence[Tensor],
    pieces: Callable[[Tensor], Iterable[np.ndarray]],
) -> Written:
  """Writes a file under a temporary name, reads it back, then renames it.

  Args:
    path: the file; replaced if it exists.
    architecture: 'gemma3' or 'clip'.
    add_metadata: adds all other keys to the writer.
    tensors: in file order.
    pieces: gives a tensor's contiguous arrays, in order.

  Raises:
    UserError: the disk is too small or refuses, or does not give back what was
      written.
  """
  atomic.check_space(path, sum(t.num_bytes for t in tensors))
  checksums, num_bytes = {}, collections.Counter()
  with atomic.whole_file(path) as temporary:
    writer = gguf.GGUFWriter(temporary, architecture)
    add_metadata(writer)
    for t in tensors:
      writer.add_tensor_info(
          t.name, t.shape, np.dtype(np.float32), t.num_bytes, t.type
      )
    try:
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.write_ti_data_to_file()
    finally:
      writer.close()
    with open(temporary, 'ab') as f:
      for t in tensors:
        f.write(bytes(-f.tell() % _ALIGNMENT))
        checksums[t.name] = _append(f, t, pieces(t))
        num_bytes[t.type.name] += t.num_bytes
      f.write(bytes(-f.tell() % _ALIGNMENT))
    verify(temporary, tensors, checksums)
  return Written(dict(num_bytes), checksums)


def verify(
    path: str | os.PathLike,
    tensors: Sequence[Tensor],
    checksums: dict[str, int],
) -> None:
  """Reads a file back and compares every tensor with what was to be written.

  Raises:
    UserError: names the first tensor that differs.
  """
  stored = gguf_header.read(path).tensors
  for t in tensors:
    found = stored.get(t.name)
    if found is None or (found.type, found.shape) != (t.type, t.shape):
      raise errors.UserError(
          f'{path}: {t.name} is not there as {t.type.name} {t.shape}: the file '
          'was changed, export it again.'
      )
    if _checksum(gguf_header.blocks(path, found, _READ)) != checksums[t.name]:
      raise errors.UserError(
          f'{path}: {t.name} does not hold the bytes that were to be written: '
          'the disk or the file is damaged, export it again.'
      )


def _append(f, t, pieces: Iterable[np.ndarray]) -> int:
  checksum, written = 0, 0
  for piece in pieces:
    data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
    f.write(data)
    checksum = zlib.crc32(data, checksum)
    written += data.nbytes
  if written != t.num_bytes:
    raise ValueError(f'{t.name}: {written} bytes instead of {t.num_bytes}.')
  return checksum


def _checksum(blocks: Iterator[bytes]) -> int:
  checksum = 0
  for block in blocks:
    checksum = zlib.crc32(block, checksum)
  return checksum
