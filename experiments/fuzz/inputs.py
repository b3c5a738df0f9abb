"""How does one row of bytes stand for a folder with one damaged file?

Byte 0 chooses the file, byte 1 what becomes of it (mostly: other contents),
the rest are the contents. So a fuzzer that knows only rows of bytes keeps a
corpus of them, and every input lies in a single file that can be run again.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib
import random
import shutil

from experiments.fuzz import ocdbt
from tests.checkpoints import malformed_contents

# Below this number byte 1 means contents.
_OTHERS = 240
LONGEST = 2**20


class Folder:
  """A valid folder, and how inputs damage it for a while.

  Args:
    path: the folder.
    is_changed: which of its files are damaged.
    is_replaced: whether other things than files come into their places.
  """

  def __init__(
      self,
      path: pathlib.Path,
      is_changed: Callable[[pathlib.Path], bool] = lambda path: True,
      is_replaced: bool = True,
  ):
    self._is_replaced = is_replaced
    self._files = [
        p for p in sorted(path.rglob('*')) if p.is_file() and is_changed(p)
    ]
    assert 0 < len(self._files) <= 256, len(self._files)
    self._contents = [p.read_bytes() for p in self._files]

  def seeds(self) -> list[bytes]:
    """One valid input a file."""
    return [bytes([i, 0]) + c for i, c in enumerate(self._contents)]

  def file(self, data: bytes) -> pathlib.Path:
    """The file that an input damages."""
    return self._files[data[0] % len(self._files)]

  @contextlib.contextmanager
  def damaged(self, data: bytes) -> Iterator[pathlib.Path]:
    """Puts an input into the folder and, later, the valid file back."""
    path, valid = self.file(data), self._contents[data[0] % len(self._files)]
    is_contents = data[1] < _OTHERS or not self._is_replaced
    if is_contents:
      path.write_bytes(data[2:])
    else:
      path.unlink()
      _replace(path, data[1])
    try:
      yield path
    finally:
      if not is_contents:
        if path.is_dir() and not path.is_symlink():
          shutil.rmtree(path)
        else:
          path.unlink(missing_ok=True)
      path.write_bytes(valid)

  def mutate(
      self,
      data: bytes,
      rng: random.Random,
      mutate_bytes: Callable[[bytes], bytes] | None = None,
  ) -> bytes:
    """Makes another input of an input.

    Args:
      data: an input, valid or damaged already.
      rng: chooses.
      mutate_bytes: the fuzzer's own changes, which know nothing of formats.
    """
    # Of what is damaged already, most is refused at the first look.
    if len(data) < 2 or rng.randrange(3) == 0:
      number = rng.randrange(len(self._files))
      contents = self._contents[number]
    else:
      number, contents = data[0] % len(self._files), data[2:]
    if rng.randrange(128) == 0:
      return bytes([number, rng.randrange(_OTHERS, 256)])
    if mutate_bytes is not None and rng.randrange(3) == 0:
      contents = mutate_bytes(contents)
    else:
      contents = _change(contents, self._contents[number],
                         kind(self._files[number]), rng)
    return bytes([number, 0]) + contents[: LONGEST - 2]


def kind(path: pathlib.Path) -> str:
  """Which structure the contents of a file have."""
  if path.name in ('_METADATA', '.zarray', '_CHECKPOINT_METADATA'):
    return 'json'
  if path.name == 'manifest.ocdbt' or path.parent.name == 'd':
    return 'ocdbt'
  return path.suffix.removeprefix('.') or 'bytes'


def _change(contents, valid, what, rng):
  if what == 'ocdbt':
    return ocdbt.change(contents, rng)
  if what == 'jsonl':
    return _change_line(contents, valid, rng)
  try:
    return malformed_contents.change(contents, what, rng)
  except Exception:  # pylint: disable=broad-exception-caught
    # Too damaged for its structure to be seen: bytes, or from the start.
    if rng.randrange(2):
      return malformed_contents.change(contents, 'bytes', rng)
    return malformed_contents.change(valid, what, rng)


def _change_line(contents, valid, rng):
  """Changes one line of JSON."""
  lines = (contents if rng.randrange(2) else valid).split(b'\n')
  at = rng.randrange(len(lines))
  try:
    text = malformed_contents.change_json(lines[at].decode(), rng)
    lines[at] = text.encode('utf-8', 'surrogatepass')
  except (ValueError, RecursionError):
    lines[at] = malformed_contents.change(lines[at], 'bytes', rng)
  return b'\n'.join(lines)


def _replace(path, what):
  """Puts something else where a file was; nothing for most numbers."""
  if what == _OTHERS:
    path.mkdir()
  elif what == _OTHERS + 1:
    os.mkfifo(path)
  elif what == _OTHERS + 2:
    path.write_bytes(b'')
  elif what <= _OTHERS + 7:
    leads = (path, path.with_name('nowhere'), '/dev/zero', '/etc/passwd', '/')
    path.symlink_to(leads[what - _OTHERS - 3])
