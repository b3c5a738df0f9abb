"""How does a model's folder come to be, whatever its weights become there?

Weights stream from their file into the new ones, a piece of one at a time.
"""

from collections.abc import Mapping
import os
from typing import Any

import numpy as np

from gemma_qat.checkpoints import atomic
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import encodings
from gemma_qat.checkpoints import huggingface_json
from gemma_qat.checkpoints import huggingface_tokenizer
from gemma_qat.checkpoints import names
from gemma_qat.checkpoints import safetensors_out
from gemma_qat.checkpoints import tokenizer_out
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import formats
from gemma_qat.quant import rules

def module_paths(checkpoint: checkpoints.Checkpoint) -> dict[str, str]:
  """Maps by-layer names to the paths of modules, in file order."""
  prefix = 'model.' if checkpoint.vision is None else 'language_model.model.'
  return {
      name: file_name.removesuffix('.weight')
      for name, file_name in names.huggingface(
          checkpoint.config, prefix
      ).items()
  }


def tensor_shapes(
    checkpoint: checkpoints.Checkpoint,
) -> dict[str, tuple[int, ...]]:
  """Shapes of the weights in the file, the embedding with its padding.

  Raises:
    UserError: weights are missing, unknown or of the wrong shape.
  """
  specs = model_weights.by_layer_specs(checkpoint.config)
  model_weights.check(specs, checkpoint.weights.entries)
  shapes = {name: names.file_shape(spec) for name, spec in specs.items()}
  rows, width = shapes['embedding']
  rows += huggingface_json.padding_rows(checkpoint)
  shapes['embedding'] = (rows, width)
  return shapes


def write(
    folder: str | os.PathLike,
    checkpoint: checkpoints.Checkpoint,
    weights: Mapping[str, encodings.Encoding],
    config: Mapping[str, Any],
    on_piece: checkpoints.OnPiece | None = None,
    written_for: str = 'pt',
    shard_bytes: int = safetensors_out.SHARD_BYTES,
) -> dict[str, int]:
  """Writes weights, config, tokenizer and the small files beside them.

  Args:
    folder: must not exist, or be empty; appears whole or not at all.
    checkpoint: what is written.
    weights: by-layer name -> what it becomes.
    config: contents of config.json.
    on_piece: told of every piece of the text model's weights.
    written_for, shard_bytes: as in `safetensors_out.write`.

  Returns:
    Bytes of tensor data by safetensors dtype.

  Raises:
    UserError: too little space on the disk, found out before anything is
      written; NaN or infinity in a weight, or the disk refuses.
  """
  tensors = [t for e in weights.values() for t in e.tensors]
  tensors += _vision_tensors(checkpoint.vision).values()
  atomic.check_space(folder, sum(t.num_bytes for t in tensors))
  with atomic.whole_folder(folder) as temporary:
    written = safetensors_out.write(
        temporary, tensors, _chunks(checkpoint, weights, on_piece),
        written_for, shard_bytes,
    )
    contents = {'config.json': config} | huggingface_json.beside(checkpoint)
    for name, content in contents.items():
      huggingface_tokenizer.write_json(temporary / name, content)
    if checkpoint.tokenizer is not None:
      tokenizer_out.save(
          checkpoint.tokenizer, temporary, checkpoint.vision is not None
      )
    for name, data in huggingface_json.verbatim(checkpoint).items():
      (temporary / name).write_bytes(data)
  return written


def _chunks(checkpoint, weights, on_piece):
  """Yields (tensor name, its next bytes)."""
  padding = huggingface_json.padding_rows(checkpoint)
  for name, encoding in weights.items():
    yield from encoding.constants.items()
    for _, piece in checkpoint.weights.pieces(name):
      arrays, written = encoding.encode(piece)
      rules.check_finite(f'{checkpoint.source}: {name}, as written,', written)
      for tensor, array in arrays.items():
        yield tensor, _bytes(array)
      if on_piece is not None:
        on_piece(name, written, checkpoints.to_float32(piece))
    if name == 'embedding' and padding:
      for tensor, array in encoding.encode(_zeros(piece, padding))[0].items():
        yield tensor, _bytes(array)
  if checkpoint.vision is not None:
    for name, tensor in _vision_tensors(checkpoint.vision).items():
      for _, piece in checkpoint.vision.weights.pieces(name):
        yield tensor.name, _bytes(piece)


def _vision_tensors(vision):
  """Names and shapes of the tower, in the dtype that each has already."""
  if vision is None:
    return {}
  kinds = {np.dtype(d): kind for kind, d in encodings.FLOATS.values()}
  entries = vision.weights.entries
  return {
      name: safetensors_out.Tensor(
          n.huggingface, kinds[entries[name].read(slice(0, 1)).dtype],
          entries[name].shape,
      )
      for name, n in names.vision(vision.config).items()
  }


def _bytes(array):
  # memoryview does not know bfloat16.
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _zeros(piece, rows):
  """Rows of zeros, of the kind that a piece is."""
  if not isinstance(piece, checkpoints.Stored):
    return np.zeros((rows, *piece.shape[1:]), piece.dtype)
  codes, scale = piece.quantized
  zero = formats.get(piece.format).zero
  return checkpoints.Stored(piece.format, formats.Quantized(
      np.full((rows, *codes.shape[1:]), zero, np.int8),
      np.zeros((rows, *scale.shape[1:]), np.float32),
  ))
