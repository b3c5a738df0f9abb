"""How does a model go into a Hugging Face folder, as floats or as int4?"""

import os

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import encodings
from gemma_qat.checkpoints import folder_out
from gemma_qat.checkpoints import huggingface_json
from gemma_qat.checkpoints import safetensors_out
from gemma_qat.model import weights as model_weights


def save(
    folder: str | os.PathLike,
    checkpoint: checkpoints.Checkpoint,
    dtype: str = 'bfloat16',
    on_piece: checkpoints.OnPiece | None = None,
    shard_bytes: int = safetensors_out.SHARD_BYTES,
) -> dict[str, int]:
  """Writes every weight as floats; codes and scales by their values.

  Args:
    folder: must not exist, or be empty; appears whole or not at all.
    checkpoint: any; its vision tower goes along unchanged.
    dtype: 'float32', 'bfloat16' or 'float16'.
    on_piece: told of every piece of the text model's weights: by-layer name,
      as written, as trained (both float32).
    shard_bytes: of tensor data in one file.

  Returns:
    Bytes of tensor data by safetensors dtype.

  Raises:
    UserError: wrong weights or dtype, NaN in one, or the disk refuses.
  """
  shapes = folder_out.tensor_shapes(checkpoint)
  weights = {
      name: encodings.floats(path, shapes[name], dtype)
      for name, path in folder_out.module_paths(checkpoint).items()
  }
  return folder_out.write(
      folder, checkpoint, weights, huggingface_json.config(checkpoint, dtype),
      on_piece, shard_bytes=shard_bytes,
  )


def save_w4a16(
    folder: str | os.PathLike,
    checkpoint: checkpoints.Checkpoint,
    scale_dtype: str = 'auto',
    dtype: str = 'float32',
    on_piece: checkpoints.OnPiece | None = None,
    shard_bytes: int = safetensors_out.SHARD_BYTES,
) -> dict[str, int]:
  """Writes the codes and scales for compressed-tensors: vLLM, transformers.

  Args:
    folder, on_piece, shard_bytes: as in `save`.
    checkpoint: one whose layer matrices are all Q4_0.
    scale_dtype: 'bfloat16', 'float16' or 'float32'; 'auto' is bfloat16 if
      that holds every scale, else float16, which Q4_0's own scales are.
    dtype: of embedding and norms: 'float32' keeps a Q8_0 embedding exact,
      'bfloat16' halves it.

  Returns:
    Bytes of tensor data by safetensors dtype.

  Raises:
    UserError: a layer matrix that is not Q4_0 (named), or as `save`.
  """
  specs = model_weights.by_layer_specs(checkpoint.config)
  shapes = folder_out.tensor_shapes(checkpoint)
  matrices = [n for n, s in specs.items() if s.contraction and '/' in n]
  for name in matrices:
    entry = checkpoint.weights.entries[name]
    if entry.format != 'q4_0':
      raise errors.UserError(
          f'{checkpoint.source}: {name} is {entry.format or entry.type}, but '
          'compressed-tensors folders are written from q4_0 alone: quantize '
          'every layer matrix to q4_0.'
      )
  if scale_dtype == 'auto':
    fits = encodings.scales_fit(checkpoint.weights, matrices, 'bfloat16')
    scale_dtype = 'bfloat16' if fits else 'float16'
  paths = folder_out.module_paths(checkpoint)
  weights = {
      name: encodings.pack_quantized(path, shapes[name], scale_dtype)
      if name in set(matrices)
      else encodings.floats(path, shapes[name], dtype)
      for name, path in paths.items()
  }
  # Readers turn scales into the type that they compute in.
  is_half = dtype == scale_dtype == 'bfloat16'
  config = huggingface_json.config(
      checkpoint, 'bfloat16' if is_half else 'float32'
  )
  config['quantization_config'] = _quantization_config()
  return folder_out.write(
      folder, checkpoint, weights, config, on_piece, shard_bytes=shard_bytes
  )


def _quantization_config():
  return {
      'quant_method': 'compressed-tensors',
      'format': 'pack-quantized',
      'quantization_status': 'compressed',
      'config_groups': {
          'group_0': {
              'targets': ['Linear'],
              'weights': {
                  'num_bits': 4,
                  'type': 'int',
                  'symmetric': True,
                  'strategy': 'group',
                  'group_size': encodings.GROUP,
                  'dynamic': False,
              },
              'input_activations': None,
              'output_activations': None,
          },
      },
      # The head is the embedding; tower and projector stay as they are.
      'ignore': [
          'lm_head', 're:.*lm_head', 're:.*embed_tokens.*',
          're:.*vision_tower.*', 're:.*multi_modal_projector.*',
      ],
      'kv_cache_scheme': None,
  }
