"""Which readers are fuzzed, and how far does each of them read?

As far as the commands would: headers, metadata and tokenizer, and two tensors
of the model.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import pathlib
import zlib
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from experiments.fuzz import samples
from gemma_qat import errors
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import huggingface_config
from gemma_qat.checkpoints import huggingface_json
from gemma_qat.checkpoints import huggingface_tokenizer
from gemma_qat.checkpoints import layouts
from gemma_qat.checkpoints import orbax_files
from gemma_qat.checkpoints import regular_files
from gemma_qat.commands import run_folders
from gemma_qat.data import chat
from gemma_qat.data import sources
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.quant import rules
from gemma_qat.reporting import comparison
from gemma_qat.reporting import page
from gemma_qat.reporting import points
from gemma_qat.training import origin
from gemma_qat.training import workdir
from tests.checkpoints import malformed_samples


class Target(NamedTuple):
  """make: fills an empty folder. read: takes the file in it that was damaged.

  is_changed: which files are damaged. is_replaced: whether a pipe, a device or
  a link may come into their places.
  """

  make: Callable[[pathlib.Path], None]
  read: Callable[[pathlib.Path], Any]
  is_changed: Callable[[pathlib.Path], bool] = lambda path: True
  is_replaced: bool = True


def _open(path):
  """Opens a model as every command does, and reads two tensors of each part."""
  checkpoint = detect.load(path)
  weights = checkpoint.weights
  for name in list(weights)[:2]:
    rules.check_finite(name, _values(weights[name]))
  if checkpoint.vision is not None:
    for name in list(checkpoint.vision.weights)[:2]:
      _values(checkpoint.vision.weights[name])
  if checkpoint.tokenizer is not None:
    checkpoint.tokenizer.decode(
        checkpoint.tokenizer.encode('<bos>The  end.\n\0', specials=True)
    )
  layouts.model_name(checkpoint)


def _values(weight):
  if isinstance(weight, tuple):
    codes, scale = weight.quantized
    np.asarray(codes)
    return np.asarray(scale)
  return np.asarray(weight)


def _read_tokenizer(path):
  tokenizer = huggingface_tokenizer.load(path.parent)
  if tokenizer is not None:
    _use(tokenizer)


def _use(tokenizer):
  ids = tokenizer.encode('<bos>The  end.\n\0', bos=True, specials=True)
  tokenizer.decode(ids)
  assert tokenizer.to_proto() and tokenizer.to_bytes() and tokenizer.digest


def _read_stored(path):
  data = regular_files.read_bytes(path, regular_files.LARGEST_TOKENIZER)
  if path.suffix == '.json':
    data = malformed_samples.MAGIC + zlib.compress(data, 1)
  _use(tokenizers.from_bytes(data))


def _read_configs(path):
  if path.parent.name == 'run':
    groups = points.group(run_folders.collect([path.parent]))
    made = comparison.make(groups)
    comparison.render_markdown(made, {})
    page.render(made, {})
    revision = origin.read_revision(path.parent)
    # What it is now is asked of git: a process, but always the same.
    revision.pop('git', None)
    origin.changes(revision)
    with contextlib.suppress(errors.UserError):
      # That run is of a version before the fields of now.
      origin.read_config(path.parent)
    with contextlib.suppress(errors.UserError):
      # It is another config: refused, whatever the file says.
      workdir.is_begun(path.parent, _CONFIG)
  elif path.name == 'config.json':
    said = huggingface_tokenizer.read_json(path)
    config = huggingface_config.read(said, str(path), 361)
    huggingface_config.read_vision(said, str(path), config.embed_dim)
  else:
    regular_files.read_json(path)
    huggingface_json.sampling(dataclasses.replace(
        _MODEL, extras={path.name: regular_files.read_bytes(path, 2**20)}
    ))


_CONFIG = ml_collections.ConfigDict({'name': 'other', 'mesh': {'fsdp': 2}})
_MODEL = samples.tiny()


def _read_text(path):
  if path.suffix == '.jinja':
    chat.template(str(path))
  else:
    documents = sources.load(f'{path.stem}:{path}')
    sources.encode(documents, _MODEL.tokenizer)


def _is_sampled(path):
  """All that is not in the folder of an array, and the arrays of a layer."""
  return not path.parent.name.count('.') or '.layer_0.' in path.parent.name


def _top(depth):
  """Opens the folder so many levels below that of the target."""
  def read(path):
    # The folder of the target is called 'sample'.
    while len(path.parts) - 1 - path.parts.index('sample') > depth:
      path = path.parent
    _open(path)
  return read


def _read_resumed(path):
  """As training goes on from a step: all is checked, and all is read."""
  while path.parent.name != 'ocdbt':
    path = path.parent
  with contextlib.suppress(errors.UserError):
    # The former, too, reads what the latter says is not what was saved.
    orbax_files.verify(path)
  orbax_files.load_manifest(path)
  orbax_files.load_tree(path, 'student')


def _read_gguf(path):
  _open(path.with_name('model.gguf'))


TARGETS = {
    'gguf': Target(samples.gguf, _read_gguf, lambda p: p.suffix == '.gguf'),
    'huggingface': Target(samples.huggingface, _top(1)),
    'tokenizer_json': Target(samples.tokenizer_json, _read_tokenizer),
    'tokenizer_model': Target(
        samples.tokenizer_model,
        lambda path: _use(tokenizers.from_proto(
            regular_files.read_bytes(path, regular_files.LARGEST_TOKENIZER)
        )),
    ),
    'stored_tokenizer': Target(samples.stored_tokenizer, _read_stored),
    'configs': Target(samples.configs, _read_configs),
    # A pipe of text is what a user may name: it is waited for.
    'text': Target(samples.text, _read_text, is_replaced=False),
    'orbax': Target(samples.orbax, _top(1), _is_sampled),
    'orbax_resumed': Target(
        samples.orbax, _read_resumed, lambda p: 'ocdbt' in p.parts
    ),
    'google': Target(samples.google, _top(2), _is_sampled),
    'sbs': Target(
        malformed_samples.SAMPLES['sbs'].make, malformed_samples.SAMPLES[
            'sbs'
        ].read,
    ),
}


def outcome(target: Target, path: pathlib.Path) -> str:
  """Returns 'read' or 'refused'; raises what no reader may raise."""
  return malformed_samples.outcome(
      malformed_samples.Sample(target.make, '', target.read), path
  )
