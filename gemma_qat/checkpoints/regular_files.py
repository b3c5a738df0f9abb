"""How is a file from anywhere opened without waiting or filling the memory?

A folder that somebody made may hold, where a file belongs, a pipe that nobody
writes to, a device that never ends, a link, or far too much. Only regular files
are opened, and those that are read whole have a largest size.

Links are followed: Hugging Face's own cache consists of them, and what they
lead to has to be a valid file of the layout. Files that would be copied into
an output as they are must lie in the folder itself or in that cache: else a
folder from elsewhere could have a private file published.
"""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import stat
from typing import Any, BinaryIO

from gemma_qat import errors

# Gemma's tokenizer.json, the largest JSON of a checkpoint, has 33 MB.
LARGEST_JSON = 2**27
_PIECE = 2**20
# Gemma's tokenizer.model has 4.7 MB.
LARGEST_TOKENIZER = 2**24
# Chat templates, generation_config.json and the like.
LARGEST_SMALL = 2**20


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """Opens a regular file to read bytes.

  Raises:
    UserError: it is missing, of another kind or cannot be read; also for what
      goes wrong with the disk while it is open.
  """
  try:
    # Without O_NONBLOCK a pipe would be waited for.
    with open(path, 'rb', opener=lambda name, flags: os.open(
        name, flags | os.O_NONBLOCK
    )) as f:
      if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
        raise errors.UserError(f'{path} is no regular file: give one.')
      yield f
  except OSError as error:
    raise errors.UserError(
        f'{path} cannot be read ({error.strerror or error}).'
    ) from error
  except ValueError as error:
    if '\0' not in os.fspath(path):
      raise
    raise errors.UserError(f'{path} cannot be the name of a file.') from error


def check(path: str | os.PathLike) -> None:
  """Raises a UserError unless `path` is a regular file that can be opened."""
  with opened(path):
    pass


def read_bytes(path: str | os.PathLike, largest: int) -> bytes:
  """Reads a file whole.

  Raises:
    UserError: as `opened`, or it has more than `largest` bytes.
  """
  data = bytearray()
  with opened(path) as f:
    # Not by its size: files of the kernel say 0. In pieces: `read` takes as much
    # memory as it is allowed to fill.
    while len(data) <= largest and (piece := f.read(_PIECE)):
      data += piece
  if len(data) > largest:
    raise errors.UserError(
        f'{path} has more than the {largest:,} bytes that such a file can '
        'need: it is not to be trusted.'
    )
  return bytes(data)


def read_text(path: str | os.PathLike, largest: int) -> str:
  """Reads UTF-8; raises as `read_bytes`, or if it is none."""
  try:
    return read_bytes(path, largest).decode('utf-8')
  except UnicodeDecodeError as error:
    raise errors.UserError(f'{path} is not UTF-8: fetch it again.') from error


def read_json(path: str | os.PathLike) -> dict[str, Any]:
  """Reads a JSON object; raises as `read_text`, or if it is none."""
  try:
    contents = json.loads(read_text(path, LARGEST_JSON))
  except (ValueError, RecursionError) as error:
    raise errors.UserError(
        f'{path} cannot be read as JSON ({error}): fetch it again.'
    ) from error
  if not isinstance(contents, dict):
    raise errors.UserError(f'{path} does not hold a JSON object.')
  return contents


def check_own(folder: pathlib.Path, name: str) -> None:
  """Refuses a file of a folder that is a link to somewhere else.

  Raises:
    UserError: it leads out of the folder, and not to the 'blobs' beside the
      'snapshots' of Hugging Face's cache either.
  """
  # Not strict: a link to itself fails when it is opened.
  target, folder = os.path.realpath(folder / name), folder.resolve()
  homes = [folder]
  if folder.parent.name == 'snapshots':
    homes.append(folder.parent.parent / 'blobs')
  if not any(pathlib.Path(target).is_relative_to(home) for home in homes):
    raise errors.UserError(
        f'{folder / name} is a link out of its folder: put a copy of the file '
        'in its place if it belongs to the checkpoint.'
    )


def check_tree(folder: pathlib.Path) -> None:
  """Refuses a folder that holds anything but files and folders of its own.

  For readers that find and open files by themselves.

  Raises:
    UserError: a pipe, a device, or a link that leads nowhere or out of it.
  """
  folder = folder.resolve()
  for where, folders, files in os.walk(folder):
    for name in (*folders, *files):
      path = pathlib.Path(where, name)
      if path.is_symlink():
        check_own(folder, str(path.relative_to(folder)))
      if not (path.is_file() or path.is_dir()):
        raise errors.UserError(
            f'{path} is no regular file: a checkpoint has none such, fetch it '
            'again.'
        )
