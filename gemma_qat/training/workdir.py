"""Does this folder belong to this run?"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import socket
import subprocess
from typing import Any, Iterator

import jax
import ml_collections

from gemma_qat import errors
from gemma_qat.checkpoints import atomic
from gemma_qat.checkpoints import regular_files

CONFIG = 'config.json'
REVISION = 'revision.json'


def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """Makes the folder, or checks that the same run began there.

  A run may go on with another `config.mesh`: arrays are saved whole.

  Writes `config.json` (resolved) and `revision.json` (git revision of the
  program, versions of what computes).

  Raises:
    UserError: another config began there (names what differs), or the folder
      cannot be written.
  """
  if is_begun(workdir, config):
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise _unusable(workdir, error) from error
  # The config last: it says that a run began.
  for name, said in ((REVISION, _revision()), (CONFIG, _plain(config))):
    with atomic.whole_file(workdir / name) as temporary:
      temporary.write_text(json.dumps(said, indent=2) + '\n', encoding='utf-8')


@contextlib.contextmanager
def hold(workdir: pathlib.Path, work: str) -> Iterator[None]:
  """Keeps other processes from the same work in a workdir.

  A lock of the operating system: it ends with the process, however that ends.

  Args:
    workdir: is made if need be.
    work: 'run', 'train' ...: names the lock's file.

  Raises:
    UserError: another process holds it, or the folder cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = open(workdir / f'.{work}.lock', 'a+', encoding='utf-8')
  except OSError as error:
    raise _unusable(workdir, error) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
      file.seek(0)
      raise errors.UserError(
          f'--workdir={workdir} is in use by {file.read().strip()}: wait for '
          'it, stop it, or choose another.'
      ) from error
    except OSError:
      pass  # A file system without locks: as if there were none.
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    yield


def is_begun(
    workdir: pathlib.Path, config: ml_collections.ConfigDict
) -> bool:
  """Whether this run began in the folder; writes nothing.

  Raises:
    UserError: another config began there, or the folder cannot be read.
  """
  path = workdir / CONFIG
  try:
    if not path.exists():
      return False
    begun = json.loads(
        regular_files.read_text(path, regular_files.LARGEST_JSON)
    )
  except (OSError, ValueError, RecursionError) as error:
    raise _unusable(workdir, error) from error
  _compare(workdir, begun, _plain(config))
  return True


def flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  """The leaves of nested dicts by their dotted names."""
  if not isinstance(tree, dict):
    return {prefix.removesuffix('.'): tree}
  leaves = {}
  for key, value in tree.items():
    leaves |= flat(value, f'{prefix}{key}.')
  return leaves


def _plain(config):
  """The config as `config.json` gives it back: tuples are lists there."""
  return json.loads(config.to_json_best_effort())


def _unusable(workdir, error):
  return errors.UserError(
      f'--workdir={workdir} cannot be used ({error}): choose another.'
  )


def _compare(workdir, old, new):
  old, new = flat(old), flat(new)
  different = sorted(
      k for k in old.keys() | new.keys()
      if old.get(k) != new.get(k) and not k.startswith('mesh.')
  )
  if different:
    key = different[0]
    more = f' and {len(different) - 1} more' if len(different) > 1 else ''
    raise errors.UserError(
        f'--workdir={workdir} was begun with another config ({key} was '
        f'{old.get(key)!r}, now {new.get(key)!r}{more}): choose another '
        'workdir, or the config that began it.'
    )


def _revision():
  versions = {
      name: version(name)
      for name in ('jax', 'flax', 'optax', 'orbax-checkpoint', 'xllamacpp')
  }
  return {'git': git_revision(), 'python': platform.python_version(),
          'device': device_name(), 'devices': jax.device_count(), **versions}


def version(package: str) -> str:
  """Returns the version that is installed, or 'not installed'.

  A machine may train without what another exports and evaluates with.
  """
  try:
    return importlib.metadata.version(package)
  # ValueError: a name that no package can have.
  except (importlib.metadata.PackageNotFoundError, ValueError):
    return 'not installed'


def git_revision() -> str:
  """The program's git revision, '+' behind it when files were changed."""
  def git(*arguments):
    return subprocess.run(
        ['git', *arguments], cwd=pathlib.Path(__file__).parent,
        capture_output=True, text=True, check=True, timeout=20,
    ).stdout.strip()
  try:
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('+' if changed else '')
  except (OSError, subprocess.SubprocessError):
    return 'unknown'


def device_name() -> str:
  """What computes: '2-core CPU', 'NVIDIA H100 80GB HBM3' ..."""
  device = jax.devices()[0]
  if device.platform != 'cpu':
    count = jax.device_count()
    return device.device_kind if count == 1 else (
        f'{count} x {device.device_kind}'
    )
  return f'{_cores()}-core CPU'


def _cores():
  return len(os.sched_getaffinity(0)) if hasattr(
      os, 'sched_getaffinity'
  ) else os.cpu_count()
