"""Forged sizes in small files cost neither memory nor time.

Each reader runs over its files in a process that may have 1 GiB more than at
its start and is killed when it hangs.
"""

import json
import pathlib
import re
import struct
import subprocess
import sys
import zlib

import pytest
from sentencepiece import sentencepiece_model_pb2

from gemma_qat import errors
from gemma_qat.data import tokenizer as tokenizers
from tests.checkpoints import malformed_contents
from tests.checkpoints import malformed_samples

_SECONDS = 120
_MOST = 40
_HUGE = (0, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
_RUN = """
import pathlib, sys
from tests.checkpoints import malformed_samples, malformed_sizes_test
malformed_sizes_test.read_all(sys.argv[1], pathlib.Path(sys.argv[2]))
"""


def read_all(name: str, folder: pathlib.Path) -> None:
  """Reads a sample with every forged file in turn; prints how many."""
  sample = malformed_samples.SAMPLES[name]
  sample.make(folder)
  malformed_samples.outcome(sample, folder)
  malformed_samples.limit_memory()
  forged = list(_forged(folder))
  # Evenly, so that every file has its share.
  forged = forged[:: -(-len(forged) // _MOST)]
  for path, data in forged:
    before = path.read_bytes()
    path.write_bytes(data)
    malformed_samples.outcome(sample, folder)
    path.write_bytes(before)
  print(len(forged))


@pytest.mark.parametrize('name', [
    name for name in malformed_samples.SAMPLES
    if not name.startswith(('detect', 'proto', 'stored'))
])
def test_forged_sizes_are_refused_within_a_gigabyte(name, tmp_path):
  done = subprocess.run(
      [sys.executable, '-c', _RUN, name, str(tmp_path.resolve())],
      capture_output=True, text=True, timeout=_SECONDS, check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert int(done.stdout) > 10


def test_a_stored_tokenizer_that_inflates_is_refused():
  packer = zlib.compressobj(9)
  bomb = b''.join(
      [packer.compress(bytes(2**20)) for _ in range(128)] + [packer.flush()]
  )
  assert len(bomb) < 2**18
  with pytest.raises(errors.UserError, match='too large'):
    tokenizers.from_bytes(malformed_samples.MAGIC + bomb)


def test_a_stored_tokenizer_of_empty_lists_is_refused():
  """What JSON says in 3 characters takes 72 bytes of memory."""
  bomb = zlib.compress(b'{"pieces": [' + b'[],' * 2**23 + b'[]]}', 9)
  assert len(bomb) < 2**16
  with pytest.raises(errors.UserError, match='too large'):
    tokenizers.from_bytes(malformed_samples.MAGIC + bomb)


def test_a_tokenizer_of_empty_pieces_is_refused():
  proto = sentencepiece_model_pb2.ModelProto()
  proto.pieces.add(piece='')
  data = proto.SerializeToString() * (2**20 + 1)
  with pytest.raises(errors.UserError, match='not a SentencePiece'):
    tokenizers.from_proto(data)


def _forged(folder):
  """Yields (file, contents with one size that is not true)."""
  for path in sorted(p for p in folder.rglob('*') if p.is_file()):
    data = path.read_bytes()
    if path.suffix == '.gguf':
      yield from ((path, d) for d in _forged_gguf(data))
    elif path.suffix == '.sbs':
      yield from ((path, d) for d in _forged_sbs(data))
    elif path.suffix == '.safetensors':
      for huge in _HUGE:
        yield path, struct.pack('<Q', huge) + data[8:]
      size, = struct.unpack('<Q', data[:8])
      for text in _forged_json(data[8 : 8 + size].decode(), 4):
        header = text.encode()
        yield path, struct.pack('<Q', len(header)) + header + data[8 + size :]
    elif data.startswith(b'{') and data.endswith(b'}'):
      most = 4 if path.name in ('.zarray', 'zarr.json') else 60
      if 'tokenizer' not in path.name:
        for text in _forged_json(data.decode(), most):
          yield path, text.encode()
    elif path.name in ('manifest.ocdbt', 'tokenizer.model'):
      for at in range(0, min(len(data), 64), 4):
        yield path, data[:at] + b'\xff' * 8 + data[at + 8 :]


def _forged_gguf(data):
  fields = [f for f in malformed_contents.gguf_fields(data) if not f[2]]
  # The first of each length: a vocabulary's texts are all alike.
  for start, end, _ in fields[:: max(1, len(fields) // 60)] + fields[:4]:
    for huge in _HUGE:
      number = (huge % 2 ** (8 * (end - start))).to_bytes(end - start, 'little')
      yield data[:start] + number + data[end:]


def _forged_sbs(data):
  for at in range(len(data) - 48, len(data), 4):
    for huge in _HUGE:
      yield data[:at] + struct.pack('<Q', huge)[: len(data) - at] + (
          data[at + 8 :]
      )
  offset, length = struct.unpack('<QQ', data[-32:-16])
  for at in range(offset, offset + min(length, 160), 4):
    yield data[:at] + b'\xff' * 4 + data[at + 4 :]


def _forged_json(text, most):
  """Replaces numbers in a JSON text, and makes it too deep."""
  numbers = list(re.finditer(r'(?<=[\s:\[,])\d+(?=[\s,\]}])', text))
  for match in numbers[:: max(1, len(numbers) // most)]:
    for huge in _HUGE[:1] + _HUGE[2:5] + _HUGE[-1:]:
      yield text[: match.start()] + str(huge) + text[match.end() :]
  contents = json.loads(text)
  for key in list(contents)[:most]:
    yield json.dumps(contents | {key: 0}).replace(
        f'"{key}": 0', f'"{key}": ' + '[' * 100_000
    )
