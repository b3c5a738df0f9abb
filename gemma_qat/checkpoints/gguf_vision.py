"""How does a vision tower come out of, and go into, a GGUF of its own?

llama.cpp reads the tower ('mmproj') beside the text model: architecture clip,
projector gemma3. Matrices are in the type asked for, everything that is added
or looked up (biases, norms, positions, patches) and the projector in float32,
which llama.cpp's own converter makes of them as well, but for the projector:
float16 there, which not every bfloat16 number survives.
"""

import functools
import os
import pathlib
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import gguf_header
from gemma_qat.checkpoints import gguf_out
from gemma_qat.checkpoints import names
from gemma_qat.model import vision as vision_config
from gemma_qat.quant import rules

ARCHITECTURE, PROJECTOR = 'clip', 'gemma3'
FLOAT_TYPES = {'bf16': 'BF16', 'f16': 'F16', 'f32': 'F32'}

_DTYPES = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}
_IN_FLOAT32 = ('patches/kernel', 'positions', 'projector/kernel')
_NORM = 'projector/norm'
_SIZES = {
    'image_size': 'image_size',
    'patch_size': 'patch_size',
    'width': 'embedding_length',
    'mlp_dim': 'feed_forward_length',
    'num_layers': 'block_count',
    'num_heads': 'attention.head_count',
    'text_dim': 'projection_dim',
}
# llama.cpp pools 4 x 4 patches for Gemma 3 and has no key for it.
_PATCHES_PER_TOKEN = 16


def beside(path: str | os.PathLike) -> pathlib.Path | None:
  """Finds the mmproj of a text model in its folder.

  'mmproj-NAME.gguf' beside 'NAME.gguf', else the only 'mmproj*.gguf' there.
  """
  path = pathlib.Path(path)
  own = path.with_name(name_for(path))
  if own.is_file():
    return own
  found = sorted(path.parent.glob('mmproj*.gguf'))
  return found[0] if len(found) == 1 else None


def name_for(path: str | os.PathLike) -> str:
  """The file name of the mmproj that belongs to a text model's file."""
  return f'mmproj-{pathlib.Path(path).name}'


def load(path: str | os.PathLike) -> checkpoints.Vision:
  """Opens an mmproj; weights are read when they are asked for.

  Raises:
    UserError: not a readable GGUF of Gemma 3's tower (says why).
  """
  header = gguf_header.read(path)
  source = os.fspath(path)
  kinds = tuple(
      gguf_header.text(header.metadata, source, key)
      for key in ('general.architecture', 'clip.projector_type')
  )
  if kinds != (ARCHITECTURE, PROJECTOR):
    raise errors.UserError(
        f'{source} holds architecture and projector {kinds}, not '
        f'{(ARCHITECTURE, PROJECTOR)}: it is no vision tower of Gemma 3.'
    )
  config = _config(header.metadata, source)
  if config.num_layers > len(header.tensors):
    raise errors.UserError(
        f'{source} announces {config.num_layers:,} layers, but has '
        f'{len(header.tensors)} tensors: the file is damaged.'
    )
  specs = vision_config.specs(config)
  file_names = {n: f.gguf for n, f in names.vision(config).items()}
  names.check_shapes(
      source,
      {file_names[n]: s.shape for n, s in specs.items()},
      {n: t.shape for n, t in header.tensors.items()},
  )
  entries = {}
  for name, spec in specs.items():
    tensor = header.tensors[file_names[name]]
    if tensor.type.name not in _DTYPES:
      raise errors.UserError(
          f'{source}: {file_names[name]} has type {tensor.type.name}; vision '
          f'towers are read in {", ".join(_DTYPES)} only.'
      )
    entries[name] = checkpoints.Entry(
        tensor.type.name, None, spec.shape, tensor.num_bytes,
        functools.partial(_read, source, tensor, name),
    )
  return checkpoints.Vision(config, checkpoints.Weights(entries))


def save(
    path: str | os.PathLike,
    vision: checkpoints.Vision,
    name: str,
    float_type: str = 'bf16',
) -> tuple[dict[str, int], float]:
  """Writes an mmproj.

  Args:
    path: the file.
    vision: the tower.
    name: for general.name.
    float_type: 'bf16' (what the published towers hold), 'f16' (for runtimes
      without bfloat16) or 'f32'.

  Returns:
    (bytes of tensor data by GGUF type, the largest change by rounding).

  Raises:
    UserError: unknown type, NaN, a number beyond float16, or the disk.
  """
  if float_type not in FLOAT_TYPES:
    raise errors.UserError(
        f'Unknown float type {float_type!r} of a vision tower: choose one of '
        f'{", ".join(FLOAT_TYPES)}.'
    )
  config = vision.config
  if config.num_positions != _PATCHES_PER_TOKEN * config.tokens_per_image:
    raise errors.UserError(
        f'A GGUF cannot say {config.tokens_per_image} tokens for '
        f'{config.num_positions} patches: llama.cpp pools '
        f'{_PATCHES_PER_TOKEN} patches into one.'
    )
  file_names = {n: f.gguf for n, f in names.vision(config).items()}
  tensors = {}
  for n, spec in vision_config.specs(config).items():
    is_matrix = n.endswith('/kernel') and n not in _IN_FLOAT32
    kind = FLOAT_TYPES[float_type] if is_matrix else 'F32'
    tensors[gguf_out.tensor(file_names[n], spec.shape, kind)] = n
  largest = 0.0

  def pieces(tensor):
    nonlocal largest
    for _, piece in vision.weights.pieces(tensors[tensor]):
      data, change = _encode(tensors[tensor], tensor, piece)
      largest = max(largest, change)
      yield data

  written = gguf_out.write(
      path, ARCHITECTURE,
      lambda writer: _add_metadata(writer, config, name, float_type),
      list(tensors), pieces,
  )
  return written.num_bytes, largest


def _encode(name, tensor, piece):
  exact = np.asarray(piece).astype(np.float64)
  if name == _NORM:
    # Nothing is added elsewhere, not even 0: of -0 it would make 0.
    exact += 1
  with np.errstate(over='ignore'):
    values = exact.astype(np.float32).astype(_DTYPES[tensor.type.name])
  rules.check_finite(f'{name} ({tensor.name}) as {tensor.type.name}', values)
  change = np.max(np.abs(values.astype(np.float64) - exact), initial=0.0)
  return values, float(change)


def _read(source, tensor, name, rows):
  data = gguf_header.read_bytes(source, tensor).view(
      _DTYPES[tensor.type.name]
  ).reshape(tensor.shape)[rows]
  if name == _NORM:
    # Exact in float32 for every gain that was made of a bfloat16 number.
    return (data.astype(np.float64) - 1).astype(np.float32)
  return np.array(data)


def _config(metadata, source):
  sizes = {}
  for field, key in _SIZES.items():
    value = metadata.get(f'clip.vision.{key}')
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise errors.UserError(
          f'{source}: clip.vision.{key} is {value!r}, expected a positive '
          'integer: convert the vision tower again.'
      )
    sizes[field] = value
  epsilon = metadata.get('clip.vision.attention.layer_norm_epsilon', 1e-6)
  if not isinstance(epsilon, float):
    raise errors.UserError(f'{source}: layer_norm_epsilon is {epsilon!r}.')
  patches = sizes['image_size'] // sizes['patch_size']
  with errors.about(source):
    return vision_config.VisionConfig(
        **sizes, tokens_per_image=patches**2 // _PATCHES_PER_TOKEN,
        # A float32 in the file.
        norm_epsilon=float(f'{epsilon:.6g}'),
    )


def _add_metadata(
    writer: Any, config: vision_config.VisionConfig, name: str, float_type: str
):
  writer.add_type('mmproj')
  writer.add_name(name)
  writer.add_clip_has_vision_encoder(True)
  writer.add_clip_projector_type(PROJECTOR)
  writer.add_vision_projection_dim(config.text_dim)
  writer.add_vision_image_size(config.image_size)
  writer.add_vision_patch_size(config.patch_size)
  writer.add_vision_embedding_length(config.width)
  writer.add_vision_feed_forward_length(config.mlp_dim)
  writer.add_vision_block_count(config.num_layers)
  writer.add_vision_head_count(config.num_heads)
  writer.add_vision_attention_layernorm_eps(config.norm_epsilon)
  # Pixels of 0 to 1 become -1 to 1.
  writer.add_vision_image_mean([0.5, 0.5, 0.5])
  writer.add_vision_image_std([0.5, 0.5, 0.5])
  writer.add_vision_use_gelu(True)
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  kinds = {'f32': 'ALL_F32', 'f16': 'MOSTLY_F16', 'bf16': 'MOSTLY_BF16'}
  writer.add_file_type(gguf.LlamaFileType[kinds[float_type]])
