"""Which bytes is a weight in a GGUF, and which weight are such bytes?"""

from collections.abc import Iterator, Mapping
import collections
from typing import Any, NamedTuple

import gguf
import libgguf
import ml_dtypes
import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import gguf_header
from gemma_qat.checkpoints import gguf_out
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
# What a plain array can become. Q6_K is rounded by ggml's own code (libgguf),
# which a second implementation would only have to follow.
FLOAT_TYPES = {'f32': 'F32', 'f16': 'F16', 'bf16': 'BF16', 'q6_k': 'Q6_K'}

# Unread, read, or (format name, codes and scales), written as they are.
Tensors = Mapping[str, Any]

# These stay codes and scales when read: GGUF type -> name of our format.
_OUR_FORMATS = {}
for _f in formats.FORMATS.values():
  if _f.ggml_type:
    _OUR_FORMATS.setdefault(_f.ggml_type, _f.name)
_DTYPES = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}
_FILE_TYPES = {
    'F32': 'ALL_F32', 'Q2_K': 'MOSTLY_Q2_K', 'Q3_K': 'MOSTLY_Q3_K_M',
    'Q4_K': 'MOSTLY_Q4_K_M', 'Q5_K': 'MOSTLY_Q5_K_M',
}


class Planned(NamedTuple):
  """One tensor to be written. is_raw: its bytes are copied from a file."""

  name: str
  spec: model_weights.WeightSpec
  tensor: gguf_out.Tensor
  is_raw: bool


def plan(
    config: model_config.ModelConfig,
    weights: checkpoints.Weights,
    float_type: str | Mapping[str, str] = 'f32',
) -> list[Planned]:
  """Decides the type of every tensor: codes as they are, norms float32.

  Args:
    config: the sizes.
    weights: by-layer name -> weight.
    float_type: of the matrices that are plain arrays, one of `FLOAT_TYPES`;
      or by name, 'f32' for those not named.

  Raises:
    UserError: a weight is missing, unknown or misshapen, a format has no
      GGUF type, or a float type is unknown or does not fit the rows.
  """
  specs = model_weights.by_layer_specs(config)
  entries = weights.entries
  names.check_shapes(
      'export',
      {n: s.shape for n, s in specs.items()},
      {n: e.shape for n, e in entries.items()},
  )
  gguf_names = names.gguf(config)
  planned = []
  for name, spec in specs.items():
    entry = entries[name]
    chosen = float_type if isinstance(float_type, str) else (
        float_type.get(name, 'f32')
    )
    is_raw = entry.raw is not None
    kind = entry.type if is_raw else _type_name(name, spec, entry, chosen)
    shape = names.file_shape(spec)
    _check_rows(name, shape, kind)
    tensor = gguf_out.tensor(gguf_names[name], shape, kind)
    planned.append(Planned(name, spec, tensor, is_raw))
  return planned


def file_type(planned: list[Planned]) -> gguf.LlamaFileType:
  """Returns the type of most weights of the layers' matrices."""
  weights = collections.Counter()
  for p in planned:
    if not names.is_norm(p.spec) and p.name not in names.OUTER:
      weights[p.tensor.type.name] += int(np.prod(p.tensor.shape))
  kind = weights.most_common(1)[0][0]
  return gguf.LlamaFileType[_FILE_TYPES.get(kind, f'MOSTLY_{kind}')]


def pieces(
    planned: Planned, weights: checkpoints.Weights
) -> Iterator[tuple[np.ndarray, Any, Any]]:
  """Makes the bytes of a tensor, piece by piece.

  Yields:
    (bytes, what a reader of them sees, what was to be written): the last two
    are the same object where nothing was rounded.
  """
  if planned.is_raw:
    entry = weights.entries[planned.name]
    for rows in weights.slices(planned.name):
      # Stands for weights that nobody decodes: a shape without memory.
      copied = np.broadcast_to(
          np.float32(0), (rows.stop - rows.start, *entry.shape[1:])
      )
      yield entry.raw(rows), copied, copied
    return
  for _, piece in weights.pieces(planned.name):
    data = encode(planned, piece)
    if isinstance(piece, checkpoints.Stored):
      yield data, piece, piece
    else:
      yield data, *_seen(planned, data, np.asarray(piece))


def encode(planned: Planned, piece) -> np.ndarray:
  """Makes the bytes of a piece: a contiguous array, a row a row.

  Raises:
    UserError: NaN or infinity, or too large for float16.
  """
  if isinstance(piece, tuple):
    name, quantized = piece
    # float16 is what the file holds: check what it makes of the scale.
    with np.errstate(over='ignore'):
      scale = np.asarray(quantized.scale).astype(np.float16)
    _check_finite(planned, scale)
    return np.ascontiguousarray(formats.get(name).pack(quantized))
  kind = planned.tensor.type
  if names.is_norm(planned.spec):
    # In float64, see `decode`: the sum is rounded once.
    values = np.asarray(piece, np.float64) + 1
  else:
    values = np.asarray(piece).reshape(-1, planned.spec.row_length)
  if kind.name not in _DTYPES:
    values = np.ascontiguousarray(values, np.float32)
    _check_finite(planned, values)
    return libgguf.quantize_rows(values, int(kind))
  with np.errstate(over='ignore'):
    values = values.astype(np.float32).astype(_DTYPES[kind.name])
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
  data = raw_rows(data, tensor, spec, rows)
  shape = (len(range(*rows.indices(spec.shape[0]))), *spec.shape[1:])
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


def raw_rows(
    data: np.ndarray,
    tensor: gguf_header.Tensor,
    spec: model_weights.WeightSpec,
    rows: slice,
) -> np.ndarray:
  """Cuts the bytes of rows out of a tensor's, [rows, row bytes] uint8."""
  # The outermost axis may stand for several rows of the file: heads do.
  start, stop, _ = rows.indices(spec.shape[0])
  per_step = names.file_shape(spec)[0] // spec.shape[0]
  return data.reshape(tensor.shape[0], -1)[start * per_step : stop * per_step]


def is_copied(
    tensor: gguf_header.Tensor, spec: model_weights.WeightSpec
) -> bool:
  """Whether only a copy of the bytes gives the same tensor again."""
  kind = tensor.type.name
  return not (
      names.is_norm(spec) or kind in _DTYPES or our_format(tensor, spec)
  )


def _seen(planned, data, piece):
  """What a reader of float bytes sees, and what was meant, both float32."""
  kind = planned.tensor.type
  if kind.name in _DTYPES:
    seen = data.astype(np.float32)
  else:
    seen = libgguf.dequantize_rows(
        data, int(kind), planned.spec.row_length
    ).astype(np.float32)
  if names.is_norm(planned.spec):
    piece = piece.astype(np.float64) + 1
  return seen.reshape(-1), piece.astype(np.float32).reshape(-1)


def _type_name(name, spec, entry, float_type):
  if entry.format is None:
    if float_type not in FLOAT_TYPES:
      raise errors.UserError(
          f'Unknown float type {float_type!r}: choose one of '
          f'{", ".join(FLOAT_TYPES)}.'
      )
    return 'F32' if names.is_norm(spec) else FLOAT_TYPES[float_type]
  if names.is_norm(spec):
    raise errors.UserError(f'{name} is a norm: GGUF wants those in float32.')
  number_format = formats.get(entry.format)
  if number_format.ggml_type is None:
    raise errors.UserError(
        f'{name} is in {entry.format}, which GGUF does not know: choose one of '
        f'{", ".join(_OUR_FORMATS.values())} or another layout.'
    )
  return number_format.ggml_type


def _check_rows(name, shape, kind):
  block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
  if shape[-1] % block:
    raise errors.UserError(
        f'{name} has rows of {shape[-1]}, but {kind} comes in blocks of '
        f'{block}: choose another type (q8_0 fits every Gemma 3).'
    )


def _check_finite(planned, values):
  rules.check_finite(
      f'{planned.name} ({planned.tensor.name}) as {planned.tensor.type.name}',
      values,
  )
