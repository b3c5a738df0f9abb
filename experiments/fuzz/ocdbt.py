"""How is a file of OCDBT changed so that its checksums still fit?

A manifest is one block, a data file holds blocks among values. A block: a
magic number, its length (8 bytes), version and compression, a body, and the
CRC-32C of all that. Without a right checksum every change would be refused at
the first look, and nothing behind it would be fuzzed.
"""

import random
import struct

from tests.checkpoints import malformed_contents

_MAGICS = (b'\x0c\xdb\x3a\x2a', b'\x0c\xdb\x20\xde', b'\x0c\xdb\x1b\xcb')
_HEAD, _TAIL = 12, 4


def change(data: bytes, rng: random.Random) -> bytes:
  """Changes a block and its checksum, or, now and then, any bytes."""
  blocks = _blocks(data)
  if not blocks or rng.randrange(4) == 0:
    return malformed_contents.change(data, 'bytes', rng)
  start, end = rng.choice(blocks)
  body = bytearray(data[start + _HEAD : end - _TAIL])
  for _ in range(rng.randrange(1, 4)):
    at = rng.randrange(len(body))
    size = rng.choice([1, 1, 1, 2, 4, 8])
    number = rng.choice([rng.choice(malformed_contents.NUMBERS),
                         rng.randrange(256)]) % 256**size
    what = rng.randrange(4)
    if what == 0 and len(body) > size:
      del body[at : at + size]
    elif what == 1:
      body[at:at] = body[at : at + size]
    else:
      body[at : at + size] = number.to_bytes(size, 'little')
    if not body:
      break
  head = data[start : start + 4] + struct.pack(
      '<Q', _HEAD + len(body) + _TAIL
  )
  block = head + bytes(body)
  return data[:start] + block + struct.pack('<I', crc32c(block)) + data[end:]


def crc32c(data: bytes) -> int:
  """The Castagnoli checksum."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
  return crc ^ 0xFFFFFFFF


def _blocks(data):
  """Finds (start, end) of blocks that are whole."""
  found = []
  for magic in _MAGICS:
    start = data.find(magic)
    while start >= 0:
      length = int.from_bytes(data[start + 4 : start + _HEAD], 'little')
      if _HEAD + _TAIL < length <= len(data) - start:
        found.append((start, start + length))
      start = data.find(magic, start + 1)
  return found


def _entry(number):
  for _ in range(8):
    number = (number >> 1) ^ (0x82F63B78 if number & 1 else 0)
  return number


_TABLE = tuple(map(_entry, range(256)))
