"""What does gemma.cpp's container (.sbs) look like, whatever is in it?

Little-endian. A header is {magic, number of blobs, bytes of the file}. Since
July 2025 files begin with one that says 0 blobs, padded to 256 bytes; the
blobs follow back to back, each padded to 256; then zeros, the directory (all
16-byte keys, then {offset, bytes} of each) and the true header end a file
whose length is a multiple of 64 KiB. So blobs can be written before their
number is known. Source: gemma.cpp, io/blob_store.cc. Older files, whose true
header comes first, are neither written nor read here.
"""

from collections.abc import Iterable, Iterator
import os
import struct
from typing import NamedTuple
import zlib

import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import regular_files

MAGIC = 0x0A534253  # b'SBS\n'
ALIGNMENT = 256
END_ALIGNMENT = 64 * 1024
KEY_BYTES = 16

_HEADER = struct.Struct('<IIQ')
_RANGE = struct.Struct('<QQ')
# gemma.cpp refuses more; so a damaged count never makes us read for long.
_MOST_BLOBS = 1024 * 1024
_CHUNK = 2**24


class Blob(NamedTuple):
  """Where a blob lies, padding left out. offset: from 0."""

  offset: int
  num_bytes: int


class Written(NamedTuple):
  """What went into a blob. crc: CRC-32 of all its bytes."""

  num_bytes: int
  crc: int


def write(
    path: str | os.PathLike,
    blobs: Iterable[tuple[str, Iterable[np.ndarray | bytes]]],
) -> dict[str, Written]:
  """Writes a container, one chunk in memory at a time.

  Args:
    path: of the file, which is replaced.
    blobs: key and chunks of each, taken in order: a later blob may say what
      was found while an earlier one was made.

  Returns:
    What each blob got, by key, in order.
  """
  written, ranges = {}, []
  with open(path, 'wb') as f:
    f.write(_padded(_HEADER.pack(MAGIC, 0, END_ALIGNMENT), ALIGNMENT))
    for key, chunks in blobs:
      if key in written or not 0 < len(key.encode()) <= KEY_BYTES:
        raise ValueError(f'{key!r} is no new key of 1 to 16 bytes.')
      offset, crc = f.tell(), 0
      for chunk in chunks:
        data = np.frombuffer(chunk, np.uint8)
        crc = zlib.crc32(data, crc)
        f.write(data)
      num_bytes = f.tell() - offset
      if not num_bytes:
        raise ValueError(f'{key!r} is empty, which the format cannot say.')
      written[key] = Written(num_bytes, crc)
      ranges.append(_RANGE.pack(offset, num_bytes))
      f.write(bytes(-num_bytes % ALIGNMENT))
    keys = [key.encode().ljust(KEY_BYTES, b'\0') for key in written]
    directory = b''.join(keys + ranges)
    end = f.tell() + _rounded(_HEADER.size + len(directory), ALIGNMENT)
    end = _rounded(end, END_ALIGNMENT)
    f.write(bytes(end - f.tell() - len(directory) - _HEADER.size))
    f.write(directory + _HEADER.pack(MAGIC, len(keys), end))
  return written


def read(path: str | os.PathLike) -> dict[str, Blob]:
  """Reads the directory and checks it as strictly as gemma.cpp does.

  Raises:
    UserError: not such a file, damaged or truncated (says what is wrong).
  """
  with regular_files.opened(path) as f:
    return _read_directory(path, f)


def chunks(path: str | os.PathLike, blob: Blob) -> Iterator[np.ndarray]:
  """Reads a blob's bytes in order, uint8, at most 16 MB at a time.

  Raises:
    UserError: the file ends early or cannot be read.
  """
  with regular_files.opened(path) as f:
    f.seek(blob.offset)
    for start in range(0, blob.num_bytes, _CHUNK):
      count = min(_CHUNK, blob.num_bytes - start)
      data = f.read(count)
      if len(data) != count:
        raise _damaged(path, 'it ends within a blob')
      yield np.frombuffer(data, np.uint8)


def read_bytes(path: str | os.PathLike, blob: Blob) -> bytes:
  """Reads a whole blob; raises as `chunks`."""
  return b''.join(chunk.tobytes() for chunk in chunks(path, blob))


def _read_directory(path, f):
  size = f.seek(0, os.SEEK_END)
  f.seek(0)
  first = f.read(_HEADER.size)
  if len(first) < _HEADER.size or first[:4] != MAGIC.to_bytes(4, 'little'):
    raise errors.UserError(f'{path} is no .sbs file of gemma.cpp.')
  if _HEADER.unpack(first)[1]:
    raise errors.UserError(
        f'{path} is an .sbs file from before July 2025, with its directory at '
        'the start: convert it with gemma.cpp first.'
    )
  f.seek(size - _HEADER.size)
  magic, count, num_bytes = _HEADER.unpack(f.read(_HEADER.size))
  if magic != MAGIC:
    raise _damaged(path, 'its last header is missing (is it whole?)')
  if num_bytes != size:
    raise _damaged(path, f'it has {size:,} bytes and says {num_bytes:,}')
  start = size - _HEADER.size - count * (KEY_BYTES + _RANGE.size)
  if not 0 < count <= _MOST_BLOBS or start < ALIGNMENT:
    raise _damaged(path, f'it says that it has {count:,} blobs')
  f.seek(start)
  keys = [f.read(KEY_BYTES).rstrip(b'\0') for _ in range(count)]
  ranges = [_RANGE.unpack(f.read(_RANGE.size)) for _ in range(count)]
  blobs, expected = {}, ALIGNMENT
  for key, (offset, length) in zip(keys, ranges):
    name = key.decode('ascii', 'replace')
    if not name or name in blobs:
      raise _damaged(path, f'it has a blob {name!r} twice or without a name')
    if offset != expected or not length or offset + length > start:
      raise _damaged(path, f'its blob {name!r} lies at the wrong place')
    blobs[name] = Blob(offset, length)
    expected = _rounded(offset + length, ALIGNMENT)
  return blobs


def _damaged(path, what):
  return errors.UserError(f'{path} is damaged, {what}: export it again.')


def _rounded(size, multiple):
  return -(-size // multiple) * multiple


def _padded(data, multiple):
  return data.ljust(_rounded(len(data), multiple), b'\0')
