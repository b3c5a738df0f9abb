"""How does a model come out of a Hugging Face folder?"""

import functools
import os
import pathlib

import numpy as np
import safetensors

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import huggingface_config
from gemma_qat.checkpoints import huggingface_tokenizer
from gemma_qat.checkpoints import names
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.model import weights as model_weights

_WHOLE, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
# As safetensors calls them -> bytes a weight.
_READABLE = {'F32': 4, 'F16': 2, 'BF16': 2}


def is_folder(path: str | os.PathLike) -> bool:
  """Whether a folder looks like a Hugging Face checkpoint."""
  return pathlib.Path(path, 'config.json').is_file()


def load(folder: str | os.PathLike) -> checkpoints.Checkpoint:
  """Opens a folder; weights are read when they are asked for.

  The vision tower of larger checkpoints is left out and named in the
  metadata ('ignored_tensors').

  Raises:
    UserError: no safetensors, not a Gemma 3, damaged or incomplete.
  """
  folder = pathlib.Path(folder)
  settings = huggingface_tokenizer.read_json(folder / 'config.json')
  found = _find_tensors(folder)
  prefix = _prefix(folder, found)
  rows, *_ = found[f'{prefix}embed_tokens.weight'][1] or (0,)
  config = huggingface_config.read(
      settings, str(folder / 'config.json'), min(rows, names.VOCABULARY)
  )
  ignored = sorted(
      n for n in found
      # Some writers repeat the tied embedding as the output head.
      if n.startswith(names.HUGGINGFACE_VISION) or n.endswith('lm_head.weight')
  )
  if config.num_layers > len(found):
    raise errors.UserError(
        f'{folder} announces {config.num_layers:,} layers, but has '
        f'{len(found)} tensors: config.json and weights do not belong together.'
    )
  specs = model_weights.by_layer_specs(config)
  file_names = names.huggingface(config, prefix)
  text = {n: f[1] for n, f in found.items() if n not in set(ignored)}
  text[file_names['embedding']] = (config.vocab_size, *text[
      file_names['embedding']][1:])
  names.check_shapes(
      str(folder),
      {file_names[n]: names.file_shape(s) for n, s in specs.items()},
      text,
  )
  metadata = {'dtype': settings.get('dtype', settings.get('torch_dtype'))}
  if ignored:
    metadata['ignored_tensors'] = ignored
  return checkpoints.Checkpoint(
      config=config,
      weights=_weights(specs, file_names, found),
      tokenizer=_tokenizer(folder, config),
      metadata=metadata,
      source=str(folder),
      layout='huggingface',
  )


def _find_tensors(folder):
  """Returns {name: (file, shape, type)} of all safetensors files."""
  if (folder / _INDEX).is_file():
    index = huggingface_tokenizer.read_json(folder / _INDEX)
    shards = sorted(set(index.get('weight_map', {}).values()))
    if any(pathlib.Path(s).name != s for s in shards):
      raise errors.UserError(f'{folder / _INDEX} names files elsewhere.')
  elif (folder / _WHOLE).is_file():
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
        found[name] = (
            folder / shard, tuple(piece.get_shape()), piece.get_dtype()
        )
  return found


def _open(path):
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
  raise errors.UserError(
      f'{folder} has no embed_tokens.weight behind any of '
      f'{", ".join(names.HUGGINGFACE_PREFIXES)}: is it a Gemma 3?'
  )


def _weights(specs, file_names, found):
  entries = {}
  for name, spec in specs.items():
    path, shape, kind = found[file_names[name]]
    if kind not in _READABLE:
      raise errors.UserError(
          f'{path}: {file_names[name]} has type {kind}; readable are '
          f'{", ".join(_READABLE)}.'
      )
    entries[name] = checkpoints.Entry(
        kind, None, spec.shape, _READABLE[kind] * int(np.prod(shape)),
        functools.partial(_read, path, file_names[name], spec),
    )
  return checkpoints.Weights(entries)


def _read(path, name, spec, rows):
  # Not to the end: the embedding may be padded beyond the vocabulary.
  start, stop, _ = rows.indices(spec.shape[0])
  per_step = names.file_shape(spec)[0] // spec.shape[0]
  with _open(path) as f:
    values = f.get_slice(name)[start * per_step : stop * per_step]
  return values.astype(np.float32).reshape(stop - start, *spec.shape[1:])


def _tokenizer(folder, config):
  tokenizer = huggingface_tokenizer.load(folder)
  if tokenizer is None or tokenizer.vocab_size == config.vocab_size:
    return tokenizer
  if tokenizer.vocab_size > config.vocab_size:
    # The tokenizer of models with vision has one piece more, the image's.
    size = config.vocab_size
    return tokenizers.from_pieces(
        tokenizer.pieces[:size], tokenizer.scores[:size],
        tokenizer.types[:size],
        bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id, unk_id=tokenizer.unk_id,
        chat_template=tokenizer.chat_template,
    )
  raise errors.UserError(
      f'{folder} has {tokenizer.vocab_size:,} tokens, but '
      f'{config.vocab_size:,} rows in its embedding: tokenizer and weights do '
      'not belong together.'
  )
