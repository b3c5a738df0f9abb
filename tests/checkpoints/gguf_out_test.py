"""A GGUF is written piece by piece and compared with what the disk holds."""

import zlib

import gguf
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import gguf_header
from gemma_qat.checkpoints import gguf_out

_SHAPE = (10, 64)


@pytest.fixture
def values():
  rng = np.random.default_rng(0)
  return {
      'a': rng.standard_normal(_SHAPE).astype(np.float32),
      # Not a multiple of the alignment: the next tensor must be padded.
      'b': rng.standard_normal(5).astype(np.float32),
      'c': rng.standard_normal(_SHAPE).astype(np.float32),
  }


def _write(path, values):
  tensors = [gguf_out.tensor(n, v.shape, 'F32') for n, v in values.items()]
  written = gguf_out.write(
      path, 'gemma3', lambda w: w.add_name('x'), tensors,
      lambda t: np.array_split(values[t.name], 3),
  )
  return tensors, written


def test_pieces_join_to_what_the_gguf_library_reads(values, tmp_path):
  _, written = _write(tmp_path / 'x.gguf', values)
  reader = gguf.GGUFReader(tmp_path / 'x.gguf')
  assert [t.name for t in reader.tensors] == list(values)
  for tensor in reader.tensors:
    np.testing.assert_array_equal(tensor.data, values[tensor.name])
  assert written.num_bytes == {'F32': sum(v.nbytes for v in values.values())}
  assert written.checksums['a'] == zlib.crc32(values['a'].tobytes())


def test_verify_finds_one_flipped_bit(values, tmp_path):
  path = tmp_path / 'x.gguf'
  tensors, written = _write(path, values)
  gguf_out.verify(path, tensors, written.checksums)
  tensor = gguf_header.read(path).tensors['c']
  data = bytearray(path.read_bytes())
  data[tensor.offset + 77] ^= 1
  path.write_bytes(data)
  with pytest.raises(errors.UserError, match='c does not hold'):
    gguf_out.verify(path, tensors, written.checksums)


def test_what_no_disk_holds_is_refused_before_anything_is_written(tmp_path):
  tensors = [gguf_out.tensor('huge', (2**40, 2**10), 'F32')]

  def never(_):
    raise AssertionError('Nothing should be read.')

  with pytest.raises(errors.UserError, match='are free'):
    gguf_out.write(tmp_path / 'x.gguf', 'gemma3', lambda w: None, tensors,
                   never)
  assert not list(tmp_path.iterdir())
