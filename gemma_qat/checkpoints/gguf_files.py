"""How does a model come out of, and go into, a GGUF file?"""

from collections.abc import Mapping
import functools
import os
from typing import Any

import gguf
import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import gguf_header
from gemma_qat.checkpoints import gguf_metadata
from gemma_qat.checkpoints import gguf_out
from gemma_qat.checkpoints import gguf_tensors
from gemma_qat.checkpoints import gguf_vision
from gemma_qat.checkpoints import names
from gemma_qat.checkpoints import padding
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.model import config as model_config
from gemma_qat.model import weights as model_weights

# Keys that follow from config, tensors and tokenizer.
_COMPUTED = (
    f'{gguf_metadata.ARCHITECTURE}.', 'tokenizer.', 'general.architecture',
    'general.type', 'general.file_type', 'general.quantization_version',
    'general.alignment',
)


def load(path: str | os.PathLike) -> checkpoints.Checkpoint:
  """Opens a GGUF; weights are read when they are asked for.

  Everything is checked first: header, length of the file, names, shapes. The
  vision tower comes from an mmproj in the same folder, if it fits the model.

  Raises:
    UserError: not a readable GGUF of a Gemma 3 text model (says why).
  """
  header = gguf_header.read(path)
  source = os.fspath(path)
  tokenizer = gguf_metadata.read_tokenizer(header.metadata, source)
  embedding = header.tensors.get('token_embd.weight')
  rows = embedding.shape[0] if embedding else names.VOCABULARY
  config = gguf_metadata.read_config(
      header.metadata, source,
      padding.count_tokens(source, rows, tokenizer),
  )
  _check(source, config, header.tensors)
  return checkpoints.Checkpoint(
      config=config,
      weights=_weights(source, config, header.tensors),
      tokenizer=padding.cut(tokenizer, config.vocab_size),
      metadata=_short(header.metadata),
      source=source,
      layout='gguf',
      vision=_vision(path, config),
  )


def save(
    path: str | os.PathLike,
    config: model_config.ModelConfig,
    weights: Mapping[str, Any],
    tokenizer: tokenizers.Tokenizer | None,
    metadata: Mapping[str, Any] | None = None,
    float_type: str | Mapping[str, str] = 'f32',
    on_piece: checkpoints.OnPiece | None = None,
) -> dict[str, int]:
  """Writes a GGUF, piece by piece, under a temporary name until whole.

  What was written is read back and compared before it gets its name.

  Args:
    path: the file; replaced if it exists.
    config: the sizes.
    weights: by-layer name -> array, or (format name, codes and scales),
      which go into the file as they are.
    tokenizer: None only for tests of tensors; llama.cpp wants one.
    metadata: more keys, as GGUF spells them ('general.name' ...). Those that
      follow from config, tensors and tokenizer are not taken from here.
    float_type: of the matrices that are plain arrays; see `gguf_tensors.plan`.
    on_piece: hears of every piece as it is written.

  Returns:
    Bytes of tensor data by GGUF type.

  Raises:
    UserError: a weight is missing, misshapen or not finite, a format has no
      GGUF type, or the disk refuses.
  """
  if not isinstance(weights, checkpoints.Weights):
    weights = checkpoints.from_arrays(weights)
  planned = {
      p.tensor: p for p in gguf_tensors.plan(config, weights, float_type)
  }

  def pieces(tensor):
    p = planned[tensor]
    for data, written, trained in gguf_tensors.pieces(p, weights):
      if on_piece is not None:
        on_piece(p.name, written, trained)
      yield data

  return gguf_out.write(
      path, gguf_metadata.ARCHITECTURE,
      lambda writer: _add_metadata(
          writer, config, list(planned.values()), tokenizer, metadata or {}
      ),
      list(planned), pieces,
  ).num_bytes


def _short(metadata):
  """Drops the vocabulary, which the tokenizer holds."""
  return {
      k: v.tolist() if isinstance(v, np.ndarray) else v
      for k, v in metadata.items()
      if not k.startswith('tokenizer.ggml.') or np.isscalar(v)
  }


def _add_metadata(writer, config, plan, tokenizer, metadata):
  """Adds all keys; those given in `metadata` never replace computed ones."""
  writer.add_type('model')
  default_name = f'gemma-3-{config.variant}'
  writer.add_name(metadata.get('general.name', default_name))
  for key, value in metadata.items():
    if not key.startswith(_COMPUTED) and key != 'general.name':
      _add_value(writer, key, value)
  gguf_metadata.add_config(writer, config)
  if tokenizer is not None:
    if tokenizer.vocab_size != config.vocab_size:
      raise errors.UserError(
          f'The tokenizer has {tokenizer.vocab_size:,} tokens, the model '
          f'{config.vocab_size:,}: give the tokenizer of this model.'
      )
    gguf_metadata.add_tokenizer(writer, tokenizer)
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  writer.add_file_type(gguf_tensors.file_type(plan))


def _add_value(writer, key, value):
  if isinstance(value, bool):
    writer.add_bool(key, value)
  elif key.startswith('general.sampling.') and isinstance(value, int):
    # In the types that llama.cpp's converter gives these.
    writer.add_int32(key, value)
  elif key.startswith('general.sampling.') and isinstance(value, float):
    writer.add_float32(key, value)
  elif isinstance(value, int):
    writer.add_int64(key, value)
  elif isinstance(value, float):
    writer.add_float64(key, value)
  elif isinstance(value, str):
    writer.add_string(key, value)
  elif isinstance(value, (list, tuple)):
    writer.add_array(key, value)
  else:
    raise errors.UserError(
        f'Metadata {key!r} is a {type(value).__name__}: only texts, numbers, '
        'booleans and lists of them fit a GGUF.'
    )


def _check(source, config, tensors):
  """Compares a file's tensors with the model before anything is read."""
  if config.num_layers > len(tensors):
    raise errors.UserError(
        f'{source} announces {config.num_layers:,} layers, but has '
        f'{len(tensors)} tensors: the file is damaged.'
    )
  specs = model_weights.by_layer_specs(config)
  expected = names.gguf(config)
  shapes = {}
  for name, tensor in tensors.items():
    if tensor.type.name not in gguf_tensors.READABLE:
      raise errors.UserError(
          f'{source}: {name} has type {tensor.type.name}, which cannot be '
          f'read; readable are {", ".join(gguf_tensors.READABLE)}.'
      )
    shapes[name] = tensor.shape
    if name == expected['embedding']:
      rows = min(tensor.shape[0], config.vocab_size)
      shapes[name] = (rows, *tensor.shape[1:])
  names.check_shapes(
      source,
      {expected[n]: names.file_shape(s) for n, s in specs.items()},
      shapes,
  )


def _vision(path, config):
  beside = gguf_vision.beside(path)
  if beside is None:
    return None
  vision = gguf_vision.load(beside)
  # Some folder of downloads may hold the tower of another size.
  return vision if vision.config.text_dim == config.embed_dim else None


def _weights(source, config, tensors):
  specs = model_weights.by_layer_specs(config)
  entries = {}
  for name, gguf_name in names.gguf(config).items():
    tensor = tensors[gguf_name]
    entries[name] = checkpoints.Entry(
        tensor.type.name,
        gguf_tensors.our_format(tensor, specs[name]),
        specs[name].shape,
        tensor.num_bytes,
        functools.partial(_read, source, tensor, specs[name]),
        functools.partial(_read_raw, source, tensor, specs[name])
        if gguf_tensors.is_copied(tensor, specs[name]) else None,
    )
  return checkpoints.Weights(entries)


def _read(source, tensor, spec, rows):
  data = gguf_header.read_bytes(source, tensor)
  return gguf_tensors.decode(data, tensor, spec, rows)


def _read_raw(source, tensor, spec, rows):
  data = gguf_header.read_bytes(source, tensor)
  return gguf_tensors.raw_rows(data, tensor, spec, rows)
