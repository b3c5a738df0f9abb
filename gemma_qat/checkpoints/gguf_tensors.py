"""Which bytes is a weight in a GGUF, and which weight are such bytes?"""

from collections.abc import Mapping
import collections
from typing import NamedTuple

import gguf
import ml_dtypes
import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import gguf_header
from gemma_qat.checkpoints import names
from gemma_qat.model import config as model_config
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import formats
from gemma_qat.quant import rules

# What `gguf.quants` dequantizes, of the types that occur in Gemma files.
READABLE = (
    'F32', 'F16', 'BF16', 'Q8_0', 'Q5_0', 'Q5_1', 'Q4_0', 'Q4_1', 'Q2_K',
    'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K',
)
FLOAT_TYPES = {'f32': 'F32', 'f16': 'F16', 'bf16': 'BF16'}

# (format name, codes and scales) goes into the file as it is.
Tensor = np.ndarray | tuple[str, formats.Quantized]

# These stay codes and scales when read: GGUF type -> name of our format.
_OUR_FORMATS = {
    f.ggml_type: f.name for f in formats.FORMATS.values() if f.ggml_type
}
_DTYPES = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}
_FILE_TYPES = {
    'F32': gguf.LlamaFileType.ALL_F32,
    'F16': gguf.LlamaFileType.MOSTLY_F16,
    'BF16': gguf.LlamaFileType.MOSTLY_BF16,
    'Q4_0': gguf.LlamaFileType.MOSTLY_Q4_0,
    'Q8_0': gguf.LlamaFileType.MOSTLY_Q8_0,
}


class Planned(NamedTuple):
  """One tensor to be written; shape as in the file, outermost axis first."""

  name: str
  gguf_name: str
  spec: model_weights.WeightSpec
  type: gguf.GGMLQuantizationType
  shape: tuple[int, ...]
  num_bytes: int


def plan(
    config: model_config.ModelConfig,
    tensors: Mapping[str, Tensor],
    float_type: str = 'f32',
) -> list[Planned]:
  """Decides the type of every tensor: codes as they are, norms float32.

  Raises:
    UserError: a weight is missing, unknown or misshapen, a format has no
      GGUF type, or `float_type` is none of `FLOAT_TYPES`.
  """
  if float_type not in FLOAT_TYPES:
    raise errors.UserError(
        f'Unknown float type {float_type!r}: choose one of '
        f'{", ".join(FLOAT_TYPES)}.'
    )
  specs = model_weights.by_layer_specs(config)
  shapes, number_formats = _shapes_and_formats(tensors)
  names.check_shapes('export', {n: s.shape for n, s in specs.items()}, shapes)
  gguf_names = names.gguf(config)
  planned = []
  for name, spec in specs.items():
    kind = gguf.GGMLQuantizationType[
        _type_name(name, spec, number_formats[name], FLOAT_TYPES[float_type])
    ]
    shape = names.file_shape(spec)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_bytes = int(np.prod(shape, dtype=np.int64)) // block * block_bytes
    planned.append(
        Planned(name, gguf_names[name], spec, kind, shape, num_bytes)
    )
  return planned


def file_type(planned: list[Planned]) -> gguf.LlamaFileType:
  """Returns the type of most weights of the layers' matrices."""
  weights = collections.Counter()
  for p in planned:
    if not names.is_norm(p.spec) and p.name not in names.OUTER:
      weights[p.type.name] += int(np.prod(p.shape, dtype=np.int64))
  return _FILE_TYPES[weights.most_common(1)[0][0]]


def encode(planned: Planned, tensor: Tensor) -> np.ndarray:
  """Makes the bytes of a tensor: a contiguous array of num_bytes bytes.

  Raises:
    UserError: NaN or infinity, or too large for float16.
  """
  if isinstance(tensor, tuple):
    name, quantized = tensor
    # float16 is what the file holds: check what it makes of the scale.
    with np.errstate(over='ignore'):
      scale = np.asarray(quantized.scale).astype(np.float16)
    _check_finite(planned, scale)
    return np.ascontiguousarray(formats.get(name).pack(quantized))
  if names.is_norm(planned.spec):
    # In float64, see `decode`: the sum is rounded once.
    tensor = (np.asarray(tensor, np.float64) + 1)
  values = np.asarray(tensor).astype(np.float32)
  with np.errstate(over='ignore'):
    values = values.astype(_DTYPES[planned.type.name])
  _check_finite(planned, values)
  return np.ascontiguousarray(values)


def decode(
    data: np.ndarray,
    tensor: gguf_header.Tensor,
    spec: model_weights.WeightSpec,
    rows: slice = slice(None),
) -> np.ndarray | checkpoints.Stored:
  """Undoes `encode` for any readable type.

  Args:
    data: the tensor's bytes, [num_bytes] uint8, perhaps with more rows than
      the weight has (a padded vocabulary), which are dropped.
    tensor: how the file describes them.
    spec: the weight.
    rows: the part of its outermost axis that is wanted.

  Returns:
    Codes and scales where one of our formats has the type, else float32; of
    norms w, which is the gain minus 1, in float64: float32 could not say it
    of gains below 0.5, and they would not come back as they were.
  """
  kind = tensor.type.name
  if names.is_norm(spec):
    gains = data.view(_DTYPES[kind]) if kind in _DTYPES else (
        gguf.quants.dequantize(data[None], tensor.type)[0]
    )
    return (gains.astype(np.float64) - 1)[rows]
  # The outermost axis may stand for several rows of the file: heads do.
  start, stop, _ = rows.indices(spec.shape[0])
  shape = (stop - start, *spec.shape[1:])
  per_step = names.file_shape(spec)[0] // spec.shape[0]
  data = data.reshape(tensor.shape[0], -1)[start * per_step : stop * per_step]
  if (name := our_format(tensor, spec)) is not None:
    return checkpoints.Stored(name, formats.get(name).unpack(data, shape))
  if kind in _DTYPES:
    # A copy: a view would keep the file open, and BF16 is not float32 anyway.
    values = data.reshape(-1).view(_DTYPES[kind]).astype(np.float32)
  else:
    values = gguf.quants.dequantize(data, tensor.type)
  return values.reshape(shape)


def our_format(
    tensor: gguf_header.Tensor, spec: model_weights.WeightSpec
) -> str | None:
  """Names our format of a tensor that `decode` leaves in codes, or None."""
  return None if names.is_norm(spec) else _OUR_FORMATS.get(tensor.type.name)


def _shapes_and_formats(tensors):
  """Returns {name: shape} and {name: format name or None}."""
  if isinstance(tensors, checkpoints.Weights):
    # Known without reading: a lazy checkpoint is read once, when written.
    entries = tensors.entries
    return (
        {n: e.shape for n, e in entries.items()},
        {n: e.format for n, e in entries.items()},
    )
  shapes, number_formats = {}, {}
  for name, tensor in tensors.items():
    if isinstance(tensor, tuple):
      number_formats[name], quantized = tensor
      shapes[name] = np.shape(quantized.codes)
    else:
      number_formats[name], shapes[name] = None, np.shape(tensor)
  return shapes, number_formats


def _type_name(name, spec, format_name, float_name):
  if format_name is None:
    return 'F32' if names.is_norm(spec) else float_name
  if names.is_norm(spec):
    raise errors.UserError(f'{name} is a norm: GGUF wants those in float32.')
  number_format = formats.get(format_name)
  if number_format.ggml_type is None:
    raise errors.UserError(
        f'{name} is in {format_name}, which GGUF does not know: choose one of '
        f'{", ".join(_OUR_FORMATS.values())} or another layout.'
    )
  return number_format.ggml_type


def _check_finite(planned, values):
  rules.check_finite(
      f'{planned.name} ({planned.gguf_name}) as {planned.type.name}', values
  )
