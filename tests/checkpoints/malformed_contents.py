"""How do the bytes of a valid file become malformed, past the first check?

Every change takes its choices from `rng`, which has the methods of
`random.Random`: hypothesis gives one that it can shrink, a script a seeded one.
"""

import json
import struct
from typing import Any

from sentencepiece import sentencepiece_model_pb2

# Lengths, counts, types and offsets; the bits of NaN and of infinity.
NUMBERS = (
    0, 1, 2, 3, 4, 6, 8, 9, 12, 31, 33, 63, 64, 127, 128, 255, 256, 2**15,
    2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33, 2**60, 2**61,
    2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1, 0x7FC00000, 0x7F800000,
    0xFF800000, 0x80000000, 0x3F800000, 0x7FF8000000000000,
)
TEXTS = (
    '', '.', '..', '/', '../x', '../../../etc/passwd', '/etc/passwd', 'a\0b',
    '\0', 'a\nb', '\x1b[31m', 'x' * 300, 'x' * 70_000, '\u2581', '\ufeff',
    '<0x00>', '<0xZZ>', '<unk>', '<bos>', 'F32', 'gemma3', '\U0010ffff', '%s',
    'C:\\x', '-1', '0', '512', 'float32', '<f4', '<i4', '|b1', 'raw',
)
# What stands in JSON where something else belongs.
JSON_TEXTS = (
    'null', 'true', 'false', '0', '-0.0', '1', '-1', '2', '0.5', '7.0', '33',
    '1e308', '1e999', '-1e999', 'NaN', 'Infinity', '-Infinity', '1e-320',
    '2147483648', '4294967296', '9223372036854775807', '9223372036854775808',
    '18446744073709551615', '-9223372036854775809', '1' + '0' * 400,
    '9' * 5000, '"\\ud800"', '"\\udc00x"', '[]', '{}', '[null]', '[[]]',
    '[0]', '[-1, 64]', '[1, 2, 3]', '{"a": 1}', '{"type": "linear"}',
    '[' * 200 + ']' * 200, '[' * 2_000 + ']' * 2_000, '[' * 100_000,
    '{"a":' * 990 + '1' + '}' * 990, '1 1', '',
)
_MARK = '#changed#'


def change(data: bytes, kind: str, rng: Any) -> bytes:
  """Returns the bytes of a file with some of them wrong."""
  own = {
      'gguf': _gguf, 'safetensors': _safetensors, 'json': _json_file,
      'model': _proto, 'sbs': _sbs,
  }.get(kind)
  if own is None or rng.randrange(6) == 0:
    return _bytes(data, rng)
  return own(data, rng)


def _bytes(data, rng):
  """Changes that know nothing of a format, most of them near its start."""
  data = bytearray(data)
  for _ in range(rng.randrange(1, 4)):
    reach = rng.choice([16, 64, 1024, len(data)])
    at = rng.randrange(max(1, min(reach, len(data))))
    if rng.randrange(3) == 0:
      at = max(0, len(data) - 1 - at)
    what = rng.randrange(6)
    if what == 0:
      data[at : at + 1] = bytes([rng.randrange(256)])
    elif what == 1:
      del data[at:]
    elif what == 2:
      del data[at : at + rng.randrange(1, 64)]
    elif what == 3:
      data[at:at] = data[at : at + rng.randrange(1, 64)]
    else:
      size = rng.choice([1, 2, 4, 8])
      data[at : at + size] = _number(rng, size)
  return bytes(data)


def _number(rng, size):
  number = rng.choice(NUMBERS) % 2 ** (8 * size)
  return number.to_bytes(size, rng.choice(['little', 'little', 'big']))


def _gguf(data, rng):
  """Wrong numbers and texts where the header has such."""
  fields = gguf_fields(data)
  texts = [data[a:b] for a, b, is_text in fields if is_text]
  chosen = {rng.choice(fields) for _ in range(rng.randrange(1, 4))}
  # From the end, so that the places of the others stay.
  for start, end, is_text in sorted(chosen, reverse=True):
    if is_text:
      text = rng.choice(TEXTS).encode()
      if rng.randrange(3) == 0:
        text = rng.choice(texts)
      data = (
          data[: start - 8] + struct.pack('<Q', len(text)) + text + data[end:]
      )
    else:
      data = data[:start] + _number(rng, end - start) + data[end:]
  return data


def gguf_fields(data: bytes) -> list[tuple[int, int, bool]]:
  """Lists (start, end, is text) of all fields of a valid GGUF header.

  Raises:
    ValueError: it ends before its last field.
  """
  fields, at = [], 4
  sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

  def number(size):
    nonlocal at
    if at + size > len(data):
      raise ValueError('this header is damaged already')
    fields.append((at, at + size, False))
    at += size
    return int.from_bytes(data[at - size : at], 'little')

  def text():
    nonlocal at
    size = number(8)
    fields.append((at, at + size, True))
    at += size

  def value(kind):
    nonlocal at
    if kind == 8:
      text()
    elif kind == 9:
      kind, count = number(4), number(8)
      if kind == 8:
        for _ in range(count):
          text()
      else:
        fields.append((at, at + sizes[kind], False))
        at += sizes[kind] * count
    else:
      number(sizes[kind])

  number(4)
  tensors, entries = number(8), number(8)
  for _ in range(entries):
    text()
    value(number(4))
  for _ in range(tensors):
    text()
    for _ in range(number(4)):
      number(8)
    number(4), number(8)
  return fields


def _safetensors(data, rng):
  size = int.from_bytes(data[:8], 'little')
  header = change_json(data[8 : 8 + size].decode(), rng).encode(
      'utf-8', 'surrogatepass'
  )
  length = len(header).to_bytes(8, 'little')
  if rng.randrange(6) == 0:
    length = _number(rng, 8)
  return length + header + data[8 + size :]


def _json_file(data, rng):
  return change_json(data.decode(), rng).encode('utf-8', 'surrogatepass')


def change_json(text: str, rng: Any) -> str:
  """Replaces, removes, renames or doubles values in a JSON text."""
  contents, raw = {'': json.loads(text)}, []
  for _ in range(rng.randrange(1, 4)):
    # Down from the top: outer values are as likely as the many inner ones.
    parent, key = contents, ''
    while isinstance(parent[key], (dict, list)) and parent[key] and (
        rng.randrange(4)
    ):
      parent = parent[key]
      keys = sorted(parent) if isinstance(parent, dict) else range(len(parent))
      key = rng.choice(keys)
    what = rng.randrange(8)
    if what == 0 and parent is not contents:
      del parent[key]
    elif what == 1 and isinstance(parent, dict) and parent is not contents:
      parent[rng.choice(TEXTS)] = parent.pop(key)
    elif what == 2:
      parent[key] = rng.choice(TEXTS)
    elif what == 3 and isinstance(parent[key], (int, float)):
      parent[key] = rng.choice(NUMBERS) * rng.choice([1, 1, -1])
    elif what == 4 and isinstance(parent[key], list):
      parent[key] = parent[key] * 2
    else:
      parent[key] = f'{_MARK}{len(raw)}{_MARK}'
      raw.append(rng.choice(JSON_TEXTS))
    if contents[''] == {}:
      break
  text = json.dumps(contents[''])
  for i, odd in enumerate(raw):
    text = text.replace(f'"{_MARK}{i}{_MARK}"', odd)
  if rng.randrange(8) == 0 and text.startswith('{"'):
    # The first key twice, with two values.
    text = '{' + text[1 : text.index('"', 2) + 1] + ': 7, ' + text[1:]
  return text


def _proto(data, rng):
  proto = sentencepiece_model_pb2.ModelProto.FromString(data)
  for _ in range(rng.randrange(1, 4)):
    what = rng.randrange(10)
    if not proto.pieces:
      break
    piece = proto.pieces[rng.randrange(len(proto.pieces))]
    if what == 0:
      piece.score = rng.choice([float('nan'), float('inf'), -1e38, 0.0])
    elif what == 1:
      piece.type = rng.randrange(1, 7)
    elif what in (2, 3):
      piece.piece = rng.choice(TEXTS)
    elif what == 4:
      piece.piece = rng.choice(proto.pieces).piece
    elif what == 5:
      piece.Clear()
    elif what == 6:
      del proto.pieces[rng.randrange(len(proto.pieces)) :]
    elif what == 7:
      name = rng.choice(['bos_id', 'eos_id', 'pad_id', 'unk_id', 'vocab_size'])
      number = rng.choice([-1, 0, 1, 3, 511, 512, 2**31 - 1, -(2**31)])
      setattr(proto.trainer_spec, name, number)
    elif what == 8:
      proto.trainer_spec.model_type = rng.randrange(1, 5)
      proto.trainer_spec.unk_piece = rng.choice(TEXTS)
    else:
      proto.normalizer_spec.name = rng.choice(TEXTS)
      proto.normalizer_spec.precompiled_charsmap = rng.choice(TEXTS).encode()
  return proto.SerializeToString()


def _sbs(data, rng):
  """Wrong words in the directory at the end and in the tables before it."""
  data = bytearray(data)
  count = int.from_bytes(data[-12:-8], 'little')
  directory = 16 + 32 * count
  # The table of tensors is the last blob.
  offset, length = struct.unpack('<QQ', data[-32:-16])
  for _ in range(rng.randrange(1, 4)):
    size = rng.choice([4, 8])
    if rng.randrange(2):
      at = len(data) - size * rng.randrange(1, directory // size + 1)
    else:
      at = offset + 4 * rng.randrange(length // 4)
    data[at : at + size] = _number(rng, size)
  return bytes(data)
