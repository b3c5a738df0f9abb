"""How does a model become a folder that MLX loads?"""

import os

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import encodings
from gemma_qat.checkpoints import folder_out
from gemma_qat.checkpoints import huggingface_json
from gemma_qat.checkpoints import safetensors_out

SCALE_DTYPES = ('auto', 'float32', 'bfloat16')


def save(
    folder: str | os.PathLike,
    checkpoint: checkpoints.Checkpoint,
    scale_dtype: str = 'auto',
    on_piece: checkpoints.OnPiece | None = None,
    shard_bytes: int = safetensors_out.SHARD_BYTES,
) -> dict[str, int]:
  """Writes codes and scales as MLX's affine groups of 32.

  Weights without codes go in as floats: bfloat16 if that is what the
  checkpoint's file holds, else float32 (never float16, in which Gemma 3's
  activations overflow).

  Args:
    folder: must not exist, or be empty; appears whole or not at all.
    checkpoint: one that holds codes and scales.
    scale_dtype: of scales and biases: 'float32' (6 bits a Q4_0 weight, always
      exact) or 'bfloat16' (5 bits); 'auto' is float32 for the embedding, and
      for the layers bfloat16 if that holds every scale of theirs.
    on_piece: told of every piece of the text model's weights: by-layer name,
      as written, as trained (both float32).
    shard_bytes: of tensor data in one file.

  Returns:
    Bytes of tensor data by safetensors dtype.

  Raises:
    UserError: nothing is quantized, unknown dtype, or the disk refuses.
  """
  if scale_dtype not in SCALE_DTYPES:
    raise errors.UserError(
        f'Unknown scale dtype {scale_dtype!r}: choose one of '
        f'{", ".join(SCALE_DTYPES)}.'
    )
  entries = checkpoint.weights.entries
  bits = {
      name: encodings.affine_bits(entry.format)
      for name, entry in entries.items() if entry.format
  }
  bits = {name: number for name, number in bits.items() if number}
  if not bits:
    raise errors.UserError(
        f'{checkpoint.source} holds no codes and scales that MLX could take: '
        'quantize it first.'
    )
  scale_dtypes = _scale_dtypes(checkpoint.weights, list(bits), scale_dtype)
  shapes = folder_out.tensor_shapes(checkpoint)
  paths = folder_out.module_paths(checkpoint)
  weights = {
      name: encodings.affine(
          path, shapes[name], entries[name].format, scale_dtypes[name]
      ) if name in bits else encodings.floats(
          path, shapes[name], _float_dtype(entries[name])
      )
      for name, path in paths.items()
  }
  quantization = {'group_size': encodings.GROUP, 'bits': 4, 'mode': 'affine'}
  quantization |= {
      paths[name]: {**quantization, 'bits': number}
      for name, number in bits.items() if number != 4
  }
  is_half = scale_dtype == 'bfloat16'
  config = huggingface_json.config(
      checkpoint, 'bfloat16' if is_half else 'float32'
  )
  if checkpoint.vision is not None:
    # mlx-lm takes the number of rows from here, 262,208 where nothing is said.
    config['vocab_size'], _ = shapes['embedding']
  # mlx-lm reads the first, its own converter writes both.
  config['quantization'] = config['quantization_config'] = quantization
  return folder_out.write(
      folder, checkpoint, weights, config, on_piece,
      _written_for(checkpoint), shard_bytes,
  )


def _scale_dtypes(weights, quantized, scale_dtype):
  if scale_dtype != 'auto':
    return dict.fromkeys(quantized, scale_dtype)
  layers = [name for name in quantized if '/' in name]
  fits = encodings.scales_fit(weights, layers, 'bfloat16')
  chosen = dict.fromkeys(layers, 'bfloat16' if fits else 'float32')
  # MLX rounds the rows that it looks up to the type of their scales (logits
  # of tiny then move by 0.08), while its products take float32 activations
  # and are exact with bfloat16 scales too.
  return chosen | dict.fromkeys(set(quantized) - set(layers), 'float32')


def _float_dtype(entry):
  is_half = entry.format is None and entry.type.upper() in ('BF16', 'BFLOAT16')
  return 'bfloat16' if is_half else 'float32'


def _written_for(checkpoint):
  # The tower's convolution keeps PyTorch's order of axes, as published;
  # mlx-vlm turns it when it loads.
  return 'mlx' if checkpoint.vision is None else 'pt'
