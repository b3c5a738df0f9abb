"""How does a file or folder appear whole or not at all?"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import tempfile

from gemma_qat import errors


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives a temporary name that becomes `path` if the block succeeds.

  The temporary file lies in the same folder, so that the last rename is
  atomic; it is removed when the block fails, and `path` stays as it was.

  Raises:
    UserError: the disk is full, or the folder missing or not writable.
  """
  path = pathlib.Path(path)
  temporary = None
  with _disk_errors(path):
    try:
      handle, name = tempfile.mkstemp(
          prefix=f'.{path.name}.', suffix='.partial', dir=path.parent
      )
      temporary = pathlib.Path(name)
      os.close(handle)
      yield temporary
      with open(temporary, 'rb') as f:
        os.fsync(f.fileno())
      # mkstemp makes files that only their owner reads.
      temporary.chmod(0o666 & ~_umask())
      os.replace(temporary, path)
    finally:
      if temporary is not None:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives a temporary folder that becomes `path` if the block succeeds.

  Raises:
    UserError: `path` exists already and is not an empty folder, the disk is
      full, or the parent missing or not writable.
  """
  path = pathlib.Path(path)
  temporary = None
  with _disk_errors(path):
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
      raise errors.UserError(
          f'{path} exists already: remove it or choose another folder.'
      )
    try:
      temporary = pathlib.Path(tempfile.mkdtemp(
          prefix=f'.{path.name}.', suffix='.partial', dir=path.parent
      ))
      yield temporary
      temporary.chmod(0o777 & ~_umask())
      os.replace(temporary, path)
    finally:
      if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_rests(folder: str | os.PathLike) -> None:
  """Removes what `whole_file` and `whole_folder` left there when killed.

  Only for a folder that nobody else writes to.
  """
  for path in pathlib.Path(folder).glob('.*.partial'):
    if path.is_dir():
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink(missing_ok=True)


def make_folder(path: str | os.PathLike) -> None:
  """Makes a folder and those above it.

  Raises:
    UserError: it cannot be made.
  """
  with _disk_errors(path):
    pathlib.Path(path).mkdir(parents=True, exist_ok=True)


def check_space(path: str | os.PathLike, num_bytes: int) -> None:
  """Refuses, before long work, what does not fit the disk.

  Raises:
    UserError: `num_bytes` are not free where `path` would lie.
  """
  folder = pathlib.Path(path).absolute().parent
  if not folder.is_dir():
    return  # Said better when the file is opened.
  free = shutil.disk_usage(folder).free
  if free < num_bytes:
    raise errors.UserError(
        f'{path} could not be written: it takes {num_bytes / 1e9:,.2f} GB, '
        f'{free / 1e9:,.2f} GB are free. Make room or choose another disk.'
    )


@contextlib.contextmanager
def _disk_errors(path):
  try:
    yield
  except OSError as error:
    raise errors.UserError(
        f'{path} could not be written ({error.strerror or error}): check '
        'that its folder exists, is writable and has space left.'
    ) from error


def _umask():
  # The only portable way to read the umask is to set it.
  umask = os.umask(0)
  os.umask(umask)
  return umask
