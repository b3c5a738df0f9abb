"""How does `--config=FILE.py:variant --config.a.b=value` become a config?"""

import argparse
from collections.abc import Callable, Sequence
import contextlib
import importlib.util
import io
import pathlib
import re
import sys

from absl import flags
import ml_collections
from ml_collections import config_flags

from gemma_qat import errors

HELP = (
    'experiments/configs/NAME.py, with a variant behind a colon (:tiny); '
    'single fields are changed with --config.FIELD=VALUE'
)


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, ml_collections.ConfigDict]:
  """Parses a command line that has a --config.

  Args:
    parser: of the command's other arguments.
    argv: what stands behind the command's name.

  Returns:
    (other arguments, locked config).

  Raises:
    UserError: no config, one that cannot be read, an unknown field, or a value
      of the wrong type.
  """
  arguments, overrides = split(parser, argv)
  return arguments, load(arguments.config, overrides)


def split(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
  """Parses a command line as `parse` does, but reads no config yet.

  Returns:
    (arguments, `config` among them; the '--config.FIELD=VALUE' overrides).

  Raises:
    UserError: no config, or a flag that nobody understands.
  """
  parser.add_argument('--config', metavar='FILE.py[:VARIANT]', help=HELP)
  arguments, rest = parser.parse_known_args(argv)
  if not arguments.config:
    raise errors.UserError(
        'Give --config=experiments/configs/NAME.py; there are '
        'gemma3_270m_cpu.py for a CPU and base.py for everything else.'
    )
  unknown = [a for a in rest if not a.startswith('--config.')]
  if unknown:
    raise errors.UserError(f'{unknown[0]} is not understood: see --help.')
  return arguments, rest


def load(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
  """Reads a config file and applies '--config.FIELD=VALUE' overrides."""
  file = _file(path)
  argv = ['gemma-qat', f'--config={path}', *overrides]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
      'config', lock_config=True, flag_values=values, sys_argv=argv
  )
  with _importable(file), contextlib.redirect_stderr(io.StringIO()):
    try:
      values(argv)
      return values['config'].value
    except errors.UserError:
      raise
    # A config is Python: whatever it raises is a mistake in what was given.
    except Exception as error:
      raise errors.UserError(f'--config={path}: {_reason(error)}') from error


def read_function(path: str, name: str) -> Callable | None:
  """Finds a function that a config file defines beside `get_config`.

  Returns:
    The function; None where the file has none of this name.

  Raises:
    UserError: the file does not exist or cannot be executed.
  """
  file = _file(path)
  spec = importlib.util.spec_from_file_location(f'config_{file.stem}', file)
  module = importlib.util.module_from_spec(spec)
  with _importable(file):
    try:
      spec.loader.exec_module(module)
    # As in `load`.
    except Exception as error:
      raise errors.UserError(f'--config={path}: {_reason(error)}') from error
  return getattr(module, name, None)


def _file(path):
  file = pathlib.Path(path.split(':')[0])
  if not file.is_file():
    raise errors.UserError(
        f'--config={path}: {file} does not exist; the configs lie in '
        'experiments/configs/.'
    )
  return file


def _reason(error: Exception) -> str:
  """One line of what went wrong.

  ml_collections puts the whole traceback of a config into its own message: the
  line that begins with the exception's name is the last of them.
  """
  text = ' '.join(str(error).split()) or type(error).__name__
  return re.split(r'\b\w+(?:Error|Exception): ', text)[-1]


@contextlib.contextmanager
def _importable(file: pathlib.Path):
  """Lets a config import its siblings as `experiments.configs.NAME`."""
  parts = file.resolve().parent.parts
  root = pathlib.Path(*parts)
  if 'experiments' in parts:
    root = pathlib.Path(*parts[: parts.index('experiments')])
  sys.path.insert(0, str(root))
  try:
    yield
  finally:
    sys.path.remove(str(root))
