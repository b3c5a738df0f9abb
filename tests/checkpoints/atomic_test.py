"""A file or folder appears whole, or the old one stays."""

import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import atomic


def test_a_file_appears_only_at_the_end(tmp_path):
  path = tmp_path / 'x'
  with atomic.whole_file(path) as temporary:
    temporary.write_bytes(b'new')
    assert not path.exists()
  assert path.read_bytes() == b'new'
  assert path.stat().st_mode & 0o444 == 0o444
  assert list(tmp_path.iterdir()) == [path]


def test_a_failure_keeps_the_old_file(tmp_path):
  path = tmp_path / 'x'
  path.write_bytes(b'old')
  with pytest.raises(ZeroDivisionError):
    with atomic.whole_file(path) as temporary:
      temporary.write_bytes(b'half')
      _ = 1 / 0
  assert path.read_bytes() == b'old'
  assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_only_at_the_end(tmp_path):
  path = tmp_path / 'x'
  with atomic.whole_folder(path) as temporary:
    (temporary / 'a').write_text('1')
    assert not path.exists()
  assert (path / 'a').read_text() == '1'
  with pytest.raises(errors.UserError, match='exists already'):
    with atomic.whole_folder(path):
      raise AssertionError('never entered')


def test_disk_errors_are_said_in_one_line(tmp_path):
  with pytest.raises(errors.UserError, match='x could not be written'):
    with atomic.whole_file(tmp_path / 'x'):
      raise OSError(28, 'No space left on device')
  with pytest.raises(errors.UserError, match='could not be written'):
    with atomic.whole_folder(tmp_path / 'missing' / 'x'):
      raise AssertionError('never entered')
  assert not list(tmp_path.iterdir())


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path):
  for name in ('.x.gguf.abc.partial', 'x.gguf', '.run.lock', 'y.partial'):
    (tmp_path / name).write_text(name)
  (tmp_path / '.folder.abc.partial' / 'deep').mkdir(parents=True)
  atomic.remove_rests(tmp_path)
  assert {p.name for p in tmp_path.iterdir()} == {
      'x.gguf', '.run.lock', 'y.partial'
  }
