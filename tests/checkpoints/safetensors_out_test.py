"""Tensors that stream into one file or several are those that come back."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gemma_qat import errors
from gemma_qat.checkpoints import safetensors_out

_KINDS = {
    'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
    'I64': np.int64, 'I32': np.int32, 'U32': np.uint32, 'U8': np.uint8,
}


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  return {
      f'x.{kind}': rng.integers(0, 100, (5, 3, 2)).astype(dtype)
      for kind, dtype in _KINDS.items()
  }


def _tensors(arrays):
  return [
      safetensors_out.Tensor(name, name.removeprefix('x.'), array.shape)
      for name, array in arrays.items()
  ]


def _in_turns(arrays):
  """A row of each tensor, then the next row of each."""
  for row in range(5):
    for name, array in arrays.items():
      yield name, array[row].tobytes()


def test_tensors_that_take_turns_come_back_in_every_dtype(arrays, tmp_path):
  written = safetensors_out.write(
      tmp_path, _tensors(arrays), _in_turns(arrays)
  )
  assert [p.name for p in tmp_path.iterdir()] == ['model.safetensors']
  read = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  assert set(read) == set(arrays)
  for name, array in arrays.items():
    assert read[name].dtype == array.dtype
    np.testing.assert_array_equal(read[name], array)
    assert written[name.removeprefix('x.')] == array.nbytes


@pytest.mark.parametrize('written_for', ['pt', 'mlx'])
def test_the_file_says_for_whom_it_was_written(arrays, tmp_path, written_for):
  safetensors_out.write(
      tmp_path, _tensors(arrays), _in_turns(arrays), written_for
  )
  path = tmp_path / 'model.safetensors'
  with safetensors.safe_open(path, framework='numpy') as f:
    assert f.metadata() == {'format': written_for}
  # Readers map the data, which wants to begin at a multiple of 8.
  assert int.from_bytes(path.read_bytes()[:8], 'little') % 8 == 0


def test_shards_keep_to_the_limit_and_the_index_finds_all(arrays, tmp_path):
  safetensors_out.write(
      tmp_path, _tensors(arrays), _in_turns(arrays), shard_bytes=200
  )
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  shards = sorted(p.name for p in tmp_path.glob('*.safetensors'))
  # 120 + 60, 60, 240, 120, 120 and 30 bytes: one is larger than the limit.
  assert shards == [f'model-{i:05d}-of-00005.safetensors' for i in range(1, 6)]
  assert index['metadata']['total_size'] == sum(
      a.nbytes for a in arrays.values()
  )
  seen = {}
  for shard in shards:
    tensors = safetensors.numpy.load_file(tmp_path / shard)
    assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 200
    seen |= {name: shard for name in tensors}
    for name, tensor in tensors.items():
      np.testing.assert_array_equal(tensor, arrays[name])
  assert index['weight_map'] == seen


@pytest.mark.parametrize('chunks, reason', [
    ([('x.F32', b'1234')], 'x.F32 got 4 of its 8 bytes'),
    ([('x.F32', b'123456789')], 'more than its 8'),
    ([('x.F32', b'12345678'), ('x.F32', b'1')], 'more than its 8'),
])
def test_other_bytes_than_announced_are_an_error(tmp_path, chunks, reason):
  tensor = safetensors_out.Tensor('x.F32', 'F32', (2,))
  with pytest.raises(ValueError, match=reason):
    safetensors_out.write(tmp_path, [tensor], chunks)


def test_a_name_can_be_taken_once(tmp_path):
  tensor = safetensors_out.Tensor('x', 'U8', (1,))
  with pytest.raises(ValueError, match='same name'):
    safetensors_out.write(tmp_path, [tensor] * 2, [('x', b'1')])


def test_a_file_that_changes_under_way_is_noticed(tmp_path):
  tensors = [safetensors_out.Tensor(n, 'U8', (4,)) for n in 'ab']

  def chunks():
    yield 'a', b'1234'
    yield 'b', b'5678'
    # Another process cuts the file off.
    (tmp_path / 'model.safetensors').write_bytes(b'')

  with pytest.raises(errors.UserError, match='read back'):
    safetensors_out.write(tmp_path, tensors, chunks())
