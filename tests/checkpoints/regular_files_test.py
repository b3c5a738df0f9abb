"""A file is read as far as it may go, and no memory is taken for the rest."""

import tracemalloc

import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import regular_files


def test_a_small_file_takes_little_memory_whatever_it_may_have(tmp_path):
  path = tmp_path / 'x'
  path.write_bytes(b'abc')
  tracemalloc.start()
  try:
    assert regular_files.read_bytes(path, 2**30) == b'abc'
    _, most = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert most < 2**23


@pytest.mark.parametrize('size', [0, 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_a_file_comes_whole_or_is_refused(tmp_path, size):
  path = tmp_path / 'x'
  path.write_bytes(bytes(i % 251 for i in range(size)))
  assert regular_files.read_bytes(path, size) == path.read_bytes()
  if size:
    with pytest.raises(errors.UserError, match='more than the'):
      regular_files.read_bytes(path, size - 1)
