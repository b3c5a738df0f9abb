"""How is a file in a folder damaged, or replaced, for a while?"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
from typing import Any

from tests.checkpoints import malformed_contents


@contextlib.contextmanager
def changed(folder: pathlib.Path, rng: Any) -> Iterator[pathlib.Path]:
  """Damages one file of a folder, or what lies in its place, for a while."""
  files = sorted(p for p in folder.rglob('*') if p.is_file())
  # Files of a kind are as likely as the only file of another.
  kinds = sorted({_kind(p) for p in files})
  kind = rng.choice(kinds)
  path = rng.choice([p for p in files if _kind(p) == kind])
  if rng.randrange(16) == 0:
    path = rng.choice([path, path, path.parent])
    if path == folder:
      path = files[0]
    damage = lambda: _replace(path, folder, rng)
  else:
    data = malformed_contents.change(path.read_bytes(), kind, rng)
    damage = lambda: path.write_bytes(data)
  aside = folder.with_name(folder.name + '.aside')
  path.rename(aside)
  try:
    damage()
    yield path
  finally:
    remove(path)
    aside.rename(path)


def remove(path: pathlib.Path) -> None:
  """Removes whatever a path is."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _kind(path):
  kind = path.suffix.removeprefix('.')
  if path.name in ('_METADATA', '.zarray', '_CHECKPOINT_METADATA'):
    kind = 'json'
  return kind if kind else 'bytes'


def _replace(path, folder, rng):
  """Puts something else where a file or folder was."""
  what = rng.randrange(8)
  if what == 0:
    path.mkdir()
  elif what == 1:
    os.mkfifo(path)
  elif what == 2:
    path.write_bytes(b'')
  elif what == 3:
    path.symlink_to(path)
  elif what == 4:
    path.symlink_to(folder / 'nowhere')
  elif what == 5:
    path.symlink_to(rng.choice(['/dev/zero', '/etc/passwd', '/', '..']))
  elif what == 6:
    path.write_bytes(b'\x80\x04\x95' + b'cos\nsystem\n' * 3)
