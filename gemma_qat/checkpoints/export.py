"""How does a checkpoint become the GGUF that llama.cpp loads?

Codes and scales are written as they are; nothing here rounds a trained lattice
a second time. Every file is read back and compared bit for bit.
"""

import functools
import os
from typing import Any, Callable, Mapping

import jax

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import gguf_files
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import formats
from gemma_qat.quant import rules

EMBEDDINGS = ('q8_0', 'q4_0', 'f16')

# Which matrices `quantize` rounds, as config.quant.rules would say it.
LAYER_MATRICES = r'(attn_[qkvo]|mlp_(gate|up|down))$'


def export(
    checkpoint: checkpoints.Checkpoint,
    path: str | os.PathLike,
    embedding: str | None = None,
) -> dict[str, int]:
  """Writes a trained checkpoint with the codes and scales it was trained to.

  Args:
    checkpoint: one whose matrices are codes and scales.
    path: the GGUF file.
    embedding: format of the embedding when it is not to stay as it is; this
      rounds it anew and is what `EMBEDDINGS` lists.

  Returns:
    Bytes of tensor data by GGUF type.

  Raises:
    UserError: nothing in the checkpoint is quantized, a format has no GGUF
      type, or the file cannot be written.
  """
  entries = checkpoint.weights.entries
  if not any(entry.format for entry in entries.values()):
    raise errors.UserError(
        f'{checkpoint.source} holds no quantized weights to export: use '
        "'gemma-qat quantize' for a file without training."
    )
  changed = {} if embedding is None else {'embedding': embedding}
  return _write(checkpoint, path, changed)


def quantize(
    checkpoint: checkpoints.Checkpoint,
    path: str | os.PathLike,
    choices: Mapping[str, str],
) -> dict[str, int]:
  """Writes a checkpoint rounded by the formats' reference rules: PTQ.

  Args:
    checkpoint: any.
    path: the GGUF file.
    choices: by-layer name -> format name or 'f16'; the rest becomes float32.

  Returns and raises as `export`.
  """
  return _write(checkpoint, path, choices)


def uniform_choices(
    checkpoint: checkpoints.Checkpoint, matrices: str, embedding: str
) -> dict[str, str]:
  """The choices that give all matrices one format, the embedding another."""
  names = model_weights.by_layer_specs(checkpoint.config)
  return rules.resolve(
      ((LAYER_MATRICES, matrices), ('^embedding$', embedding)), names
  )


def save_float(
    checkpoint: checkpoints.Checkpoint,
    path: str | os.PathLike,
    float_type: str = 'bf16',
) -> dict[str, int]:
  """Writes every matrix as `float_type`: 'f32', 'f16' or 'bf16'."""
  names = checkpoint.weights
  return _write(checkpoint, path, {n: 'float' for n in names}, float_type)


def _write(checkpoint, path, choices, float_type='f16'):
  specs = model_weights.by_layer_specs(checkpoint.config)
  entries = {
      name: _choose(entry, choices[name], specs[name].contraction)
      if name in choices and specs[name].contraction else entry
      for name, entry in checkpoint.weights.entries.items()
  }
  tensors = checkpoints.Weights(entries)
  metadata = _metadata(checkpoint)
  arguments = checkpoint.config, tensors
  written = gguf_files.save(
      path, *arguments, checkpoint.tokenizer, metadata, float_type
  )
  return written


def _choose(entry, choice, contraction):
  """An entry that reads as the chosen format."""
  if choice in ('f16', 'float'):
    return entry._replace(
        type='F32', format=None,
        read=functools.partial(_as_float, entry.read),
    )
  number_format = formats.get(choice)
  return entry._replace(
      type=number_format.ggml_type or choice, format=choice,
      read=functools.partial(_as_codes, entry.read, number_format, contraction),
  )


def _as_float(read: Callable[[slice], Any], rows):
  return checkpoints.to_float32(read(rows))


def _as_codes(read, number_format, contraction, rows):
  weight = read(rows)
  if isinstance(weight, checkpoints.Stored):
    if weight.format == number_format.name:
      return weight
  return checkpoints.Stored(
      number_format.name,
      _quantize(number_format, contraction, checkpoints.to_float32(weight)),
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantize(number_format, contraction, weight):
  return number_format.quantize(weight, contraction)


def _metadata(checkpoint) -> dict[str, Any]:
  """What the new file says of its origin."""
  kept = {
      key: value for key, value in checkpoint.metadata.items()
      if key.startswith('general.')
  }
  return kept if checkpoint.layout == 'gguf' else {}
