"""A container is laid out as gemma.cpp demands, and damage is seen."""

import struct

import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import sbs_blobs

_BLOBS = {
    'one': b'x', 'full': bytes(range(256)), 'sixteen_letters_': b'y' * 257,
    'config': b'\0' * 70_000,
}


@pytest.fixture
def path(tmp_path):
  path = tmp_path / 'x.sbs'
  written = sbs_blobs.write(
      path, ((key, [data[:3], data[3:]]) for key, data in _BLOBS.items())
  )
  assert list(written) == list(_BLOBS)
  return path


def test_blobs_come_back_in_order(path):
  blobs = sbs_blobs.read(path)
  assert list(blobs) == list(_BLOBS)
  for key, blob in blobs.items():
    assert sbs_blobs.read_bytes(path, blob) == _BLOBS[key]


def test_the_file_has_both_headers_and_aligned_blobs(path):
  data = path.read_bytes()
  assert data[:16] == b'SBS\n' + struct.pack('<IQ', 0, 64 * 1024)
  assert not any(data[16:256])
  assert len(data) == 2 * 64 * 1024
  assert data[-16:] == b'SBS\n' + struct.pack('<IQ', len(_BLOBS), len(data))
  directory = data[-16 - 32 * len(_BLOBS) : -16]
  ranges = struct.unpack('<8Q', directory[16 * len(_BLOBS) :])
  expected = 256
  for i, (key, content) in enumerate(_BLOBS.items()):
    assert directory[16 * i : 16 * (i + 1)] == key.encode().ljust(16, b'\0')
    offset, length = ranges[2 * i : 2 * i + 2]
    assert (offset, length) == (expected, len(content))
    assert data[offset : offset + length] == content
    expected += -(-length // 256) * 256
    assert not any(data[offset + length : expected])


@pytest.mark.parametrize('end', [0, 3, 15, 16, 300, 65_536, -16, -1])
def test_a_cut_file_is_refused(path, end):
  path.write_bytes(path.read_bytes()[:end])
  with pytest.raises(errors.UserError, match='x.sbs'):
    sbs_blobs.read(path)


@pytest.mark.parametrize('where, what, match', [
    (-16, b'GGUF', 'last header'), (-12, b'\xff\xff\xff\xff', 'blobs'),
    (-12, b'\0\0\0\0', 'blobs'), (-12, b'\3', 'wrong place|without a name'),
    (-8, b'\1', 'bytes and says'), (-31, b'\xff', 'wrong place'),
    (-24, b'\0\0\0', 'wrong place'), (-20, b'\xff', 'wrong place'),
    (-16 - 128, b'config' + bytes(10), "'config' twice"),
    (0, b'GGUF', 'no .sbs'), (4, b'\4', 'before July 2025'),
])
def test_a_damaged_directory_is_refused(path, where, what, match):
  data = bytearray(path.read_bytes())
  where %= len(data)
  data[where : where + len(what)] = what
  path.write_bytes(data)
  with pytest.raises(errors.UserError, match=match):
    sbs_blobs.read(path)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(errors.UserError, match='none.sbs cannot be read'):
    sbs_blobs.read(tmp_path / 'none.sbs')


@pytest.mark.parametrize('key', ['', 'seventeen_letters', 'a'])
def test_keys_are_unique_and_fit(tmp_path, key):
  with pytest.raises(ValueError, match='no new key'):
    sbs_blobs.write(tmp_path / 'x', [('a', [b'1']), (key, [b'2'])])
