"""How does a model come out of, and go into, a GGUF file?"""

from collections.abc import Mapping
import collections
import functools
import os
from typing import Any

import gguf
import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import atomic
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import gguf_header
from gemma_qat.checkpoints import gguf_metadata
from gemma_qat.checkpoints import gguf_tensors
from gemma_qat.checkpoints import names
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

  Everything is checked first: header, length of the file, names, shapes.

  Raises:
    UserError: not a readable GGUF of a Gemma 3 text model (says why).
  """
  header = gguf_header.read(path)
  source = os.fspath(path)
  embedding = header.tensors.get('token_embd.weight')
  rows = embedding.shape[0] if embedding else names.VOCABULARY
  config = gguf_metadata.read_config(
      header.metadata, source, min(rows, names.VOCABULARY)
  )
  tokenizer = gguf_metadata.read_tokenizer(header.metadata, source)
  if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
    raise errors.UserError(
        f'{source} has {tokenizer.vocab_size:,} tokens, but {rows:,} rows in '
        'its embedding: convert the model again.'
    )
  _check(source, config, header.tensors)
  return checkpoints.Checkpoint(
      config=config,
      weights=_weights(source, config, header.tensors),
      tokenizer=tokenizer,
      metadata=_short(header.metadata),
      source=source,
      layout='gguf',
  )


def save(
    path: str | os.PathLike,
    config: model_config.ModelConfig,
    tensors: Mapping[str, gguf_tensors.Tensor],
    tokenizer: tokenizers.Tokenizer | None,
    metadata: Mapping[str, Any] | None = None,
    float_type: str = 'f32',
) -> dict[str, int]:
  """Writes a GGUF, tensor by tensor, under a temporary name until whole.

  Args:
    path: the file; replaced if it exists.
    config: the sizes.
    tensors: by-layer name -> array, or (format name, codes and scales),
      which go into the file as they are.
    tokenizer: None only for tests of tensors; llama.cpp wants one.
    metadata: more keys, as GGUF spells them ('general.name' ...). Those that
      follow from config, tensors and tokenizer are not taken from here.
    float_type: 'f32', 'f16' or 'bf16' for matrices that are plain arrays.

  Returns:
    Bytes of tensor data by GGUF type.

  Raises:
    UserError: a weight is missing, misshapen or not finite, a format has no
      GGUF type, or the disk refuses.
  """
  plan = gguf_tensors.plan(config, tensors, float_type)
  with atomic.whole_file(path) as temporary:
    writer = gguf.GGUFWriter(temporary, gguf_metadata.ARCHITECTURE)
    _add_metadata(writer, config, plan, tokenizer, metadata or {})
    for p in plan:
      writer.add_tensor_info(
          p.gguf_name, p.shape, np.dtype(np.float32), p.num_bytes, p.type
      )
    try:
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.write_ti_data_to_file()
      for p in plan:
        writer.write_tensor_data(gguf_tensors.encode(p, tensors[p.name]))
    finally:
      writer.close()
  written = collections.Counter()
  for p in plan:
    written[p.type.name] += p.num_bytes
  return dict(written)


def verify(
    path: str | os.PathLike,
    config: model_config.ModelConfig,
    tensors: Mapping[str, gguf_tensors.Tensor],
    float_type: str = 'f32',
) -> None:
  """Reads a file back and compares every tensor bit for bit.

  Takes what `save` took.

  Raises:
    UserError: names the first tensor that differs.
  """
  stored = gguf_header.read(path).tensors
  for p in gguf_tensors.plan(config, tensors, float_type):
    tensor = stored.get(p.gguf_name)
    if tensor is None or (tensor.type, tensor.shape) != (p.type, p.shape):
      raise errors.UserError(
          f'{path}: {p.gguf_name} is not there as {p.type.name} {p.shape}: '
          'the file was changed, export it again.'
      )
    expected = gguf_tensors.encode(p, tensors[p.name]).reshape(-1)
    if not np.array_equal(
        gguf_header.read_bytes(path, tensor), expected.view(np.uint8)
    ):
      raise errors.UserError(
          f'{path}: {p.gguf_name} does not hold the bytes that were to be '
          'written: the disk or the file is damaged, export it again.'
      )


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
    )
  return checkpoints.Weights(entries)


def _read(source, tensor, spec, rows):
  data = gguf_header.read_bytes(source, tensor)
  return gguf_tensors.decode(data, tensor, spec, rows)
