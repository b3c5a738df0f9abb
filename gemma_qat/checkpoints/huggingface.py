"""How does a model come out of a Hugging Face folder?"""

import functools
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np
import safetensors

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import huggingface_config
from gemma_qat.checkpoints import huggingface_tokenizer
from gemma_qat.checkpoints import names
from gemma_qat.checkpoints import padding
from gemma_qat.checkpoints import regular_files
from gemma_qat.model import vision as vision_config
from gemma_qat.model import weights as model_weights

_WHOLE, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
# As safetensors calls them -> bytes a weight.
_READABLE = {'F32': 4, 'F16': 2, 'BF16': 2}
# What processors and generation are told, which no weight depends on.
_SHARD = re.compile(r'[\w.-]+\.safetensors')
_EXTRAS = (
    'generation_config.json', 'preprocessor_config.json',
    'processor_config.json',
)


def is_folder(path: str | os.PathLike) -> bool:
  """Whether a folder looks like a Hugging Face checkpoint."""
  return pathlib.Path(path, 'config.json').is_file()


def load(folder: str | os.PathLike) -> checkpoints.Checkpoint:
  """Opens a folder; weights are read when they are asked for.

  Raises:
    UserError: no safetensors, not a Gemma 3, damaged or incomplete.
  """
  folder = pathlib.Path(folder)
  settings = huggingface_tokenizer.read_json(folder / 'config.json')
  found = _find_tensors(folder)
  prefix = _prefix(folder, found)
  rows, *_ = found[f'{prefix}embed_tokens.weight'].shape or (0,)
  tokenizer = huggingface_tokenizer.load(folder)
  config = huggingface_config.read(
      settings, str(folder / 'config.json'),
      padding.count_tokens(str(folder), rows, tokenizer),
  )
  if config.num_layers > len(found):
    raise errors.UserError(
        f'{folder} announces {config.num_layers:,} layers, but has '
        f'{len(found)} tensors: config.json and weights do not belong together.'
    )
  # Some writers repeat the tied embedding as the output head.
  heads = [n for n in found if n.endswith('lm_head.weight')]
  rest = {n: t for n, t in found.items() if n not in heads}
  tower = {
      n.removeprefix('model.'): rest.pop(n) for n in list(rest)
      if n.startswith(names.HUGGINGFACE_VISION)
  }
  file_names = names.huggingface(config, prefix)
  embedding = file_names['embedding']
  rest[embedding] = rest[embedding]._replace(
      shape=(config.vocab_size, *rest[embedding].shape[1:])
  )
  return checkpoints.Checkpoint(
      config=config,
      weights=_weights(
          folder, model_weights.by_layer_specs(config), file_names, rest
      ),
      tokenizer=padding.cut(tokenizer, config.vocab_size),
      metadata={
          'dtype': _text(settings.get('dtype', settings.get('torch_dtype'))),
          **({'ignored_tensors': heads} if heads else {}),
      },
      source=str(folder),
      layout='huggingface',
      vision=_vision(folder, settings, config, tower) if tower else None,
      extras=_extras(folder),
  )


class _Tensor(NamedTuple):
  path: pathlib.Path
  name: str
  shape: tuple[int, ...]
  type: str


def _text(value):
  return value if isinstance(value, str) else None


def _find_tensors(folder) -> dict[str, _Tensor]:
  """Lists the tensors of all safetensors files."""
  if (folder / _INDEX).exists():
    index = huggingface_tokenizer.read_json(folder / _INDEX)
    shards = index.get('weight_map')
    shards = shards.values() if isinstance(shards, dict) else [None]
    if not shards or not all(
        isinstance(s, str) and _SHARD.fullmatch(s) for s in shards
    ):
      raise errors.UserError(
          f'{folder / _INDEX} names files elsewhere or none: fetch it again.'
      )
    shards = sorted(set(shards))
  elif (folder / _WHOLE).exists():
    shards = [_WHOLE]
  else:
    raise errors.UserError(
        f'{folder} has neither {_WHOLE} nor {_INDEX}: only safetensors are '
        'read (pickles could run code); convert the checkpoint.'
    )
  found = {}
  for shard in shards:
    with _open(folder / shard) as f:
      for name in f.keys():
        piece = f.get_slice(name)
        found[name] = _Tensor(
            folder / shard, name, tuple(piece.get_shape()), piece.get_dtype()
        )
  return found


def _open(path):
  # safetensors would wait for a pipe.
  regular_files.check(path)
  try:
    return safetensors.safe_open(path, framework='numpy')
  except (OSError, safetensors.SafetensorError) as error:
    raise errors.UserError(
        f'{path} is missing, truncated or damaged ({error}): fetch it again.'
    ) from error


def _prefix(folder, found):
  for prefix in names.HUGGINGFACE_PREFIXES:
    if f'{prefix}embed_tokens.weight' in found:
      return prefix
  if any(n.endswith(('_packed', '.scales', '.qweight')) for n in found):
    raise errors.UserError(
        f'{folder} holds weights that are quantized already: give the '
        'unquantized folder, or the GGUF, that they were made from.'
    )
  raise errors.UserError(
      f'{folder} has no embed_tokens.weight behind any of '
      f'{", ".join(names.HUGGINGFACE_PREFIXES)}: is it a Gemma 3?'
  )


def _weights(folder, specs, file_names, found):
  names.check_shapes(
      str(folder),
      {file_names[n]: names.file_shape(s) for n, s in specs.items()},
      {n: t.shape for n, t in found.items()},
  )
  return checkpoints.Weights({
      n: _entry(found[file_names[n]], s, names.file_shape(s)[0], np.float32)
      for n, s in specs.items()
  })


def _vision(folder, settings, config, found):
  sizes = huggingface_config.read_vision(
      settings, str(folder / 'config.json'), config.embed_dim
  )
  if sizes.num_layers > len(found):
    raise errors.UserError(
        f'{folder} announces {sizes.num_layers:,} vision layers, but has '
        f'{len(found)} tensors of them: config.json and weights do not belong '
        'together.'
    )
  specs = vision_config.specs(sizes)
  file_names = {n: f.huggingface for n, f in names.vision(sizes).items()}
  names.check_shapes(
      str(folder),
      {file_names[n]: s.shape for n, s in specs.items()},
      {n: t.shape for n, t in found.items()},
  )
  return checkpoints.Vision(sizes, checkpoints.Weights({
      n: _entry(found[file_names[n]], s, s.shape[0], None)
      for n, s in specs.items()
  }))


def _entry(tensor, spec, file_rows, dtype):
  if tensor.type not in _READABLE:
    raise errors.UserError(
        f'{tensor.path}: {tensor.name} has type {tensor.type}; readable are '
        f'{", ".join(_READABLE)}.'
    )
  count = int(np.prod(spec.shape, dtype=np.int64))
  return checkpoints.Entry(
      tensor.type, None, spec.shape, _READABLE[tensor.type] * count,
      functools.partial(_read, tensor, spec, file_rows, dtype),
  )


def _read(tensor, spec, file_rows, dtype, rows):
  # Not to the end: the embedding may be padded beyond the vocabulary.
  start, stop, _ = rows.indices(spec.shape[0])
  per_step = file_rows // spec.shape[0]
  with _open(tensor.path) as f:
    values = f.get_slice(tensor.name)[start * per_step : stop * per_step]
  values = values if dtype is None else values.astype(dtype)
  return values.reshape(stop - start, *spec.shape[1:])


def _extras(folder):
  """Small files that only pass through, from a folder to a folder."""
  extras = {}
  for name in _EXTRAS:
    if (folder / name).exists():
      regular_files.check_own(folder, name)
      regular_files.read_json(folder / name)
      extras[name] = regular_files.read_bytes(
          folder / name, regular_files.LARGEST_SMALL
      )
  return extras
