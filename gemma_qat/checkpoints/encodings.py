"""What does a weight become in a safetensors file?

Either floats of some type, or words of 4 or 8 bits with a scale (and a bias)
for every 32 weights. Codes and scales of ours go into the words as they are;
nothing is quantized here.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import safetensors_out
from gemma_qat.quant import formats

GROUP = 32

# Our name of a float type -> safetensors' and numpy's.
FLOATS = {
    'float32': ('F32', np.float32),
    'bfloat16': ('BF16', ml_dtypes.bfloat16),
    'float16': ('F16', np.float16),
}


class Encoding(NamedTuple):
  """How one weight goes into a file.

  tensors: what it becomes. constants: those that do not depend on the
  weight, name -> bytes. encode: piece of the weight -> ({tensor name: the
  rows of it}, the float32 weights that these stand for).
  """

  tensors: tuple[safetensors_out.Tensor, ...]
  constants: Mapping[str, bytes]
  encode: Callable[
      ['np.ndarray | checkpoints.Stored'],
      tuple[dict[str, np.ndarray], np.ndarray],
  ]


def floats(path: str, shape: tuple[int, ...], dtype: str) -> Encoding:
  """A weight as floats, rounded to nearest; `Stored` ones by their values.

  Args:
    path: of the module: the tensor is 'PATH.weight'.
    shape: of the tensor.
    dtype: 'float32', 'bfloat16' or 'float16'.
  """
  kind, numpy_dtype = FLOATS[_check_dtype(dtype, FLOATS)]
  tensor = safetensors_out.Tensor(f'{path}.weight', kind, shape)

  def encode(piece):
    # float16 may overflow: the caller refuses what is not finite.
    with np.errstate(over='ignore'):
      values = checkpoints.to_float32(piece).astype(numpy_dtype)
    return {tensor.name: values}, values.astype(np.float32)

  return Encoding((tensor,), {}, encode)


def pack_quantized(
    path: str, shape: tuple[int, ...], scale_dtype: str
) -> Encoding:
  """Q4_0 as compressed-tensors packs symmetric int4 in groups of 32.

  Args:
    path: of the module.
    shape: [rows, row length].
    scale_dtype: 'float32', 'bfloat16' or 'float16'.
  """
  kind, numpy_dtype = FLOATS[_check_dtype(scale_dtype, FLOATS)]
  rows, length = shape
  packed, scales, size = (
      safetensors_out.Tensor(f'{path}.weight_packed', 'I32',
                             (rows, length // 8)),
      safetensors_out.Tensor(f'{path}.weight_scale', kind,
                             (rows, length // GROUP)),
      safetensors_out.Tensor(f'{path}.weight_shape', 'I64', (2,)),
  )

  def encode(piece):
    codes, scale = _rows(piece, length)
    scale = scale.astype(numpy_dtype)
    # Its codes are -8 ... 7, stored with 8 added: Q4_0's own.
    written = (_groups(codes) - 8) * _column(scale)
    return {packed.name: words(codes, 4), scales.name: scale}, (
        written.reshape(np.shape(piece.quantized.codes))
    )

  constants = {size.name: np.array(shape, np.int64).tobytes()}
  return Encoding((packed, scales, size), constants, encode)


def affine(
    path: str, shape: tuple[int, ...], number_format: str, scale_dtype: str
) -> Encoding:
  """Codes of a uniform format as MLX holds them: scale * q + bias.

  Exact for block formats wherever the type holds the scale: the bias is the
  scale times -8 or -128, and float16 times a code fits float32. The float32
  scale of a channel leaves the last bits to the reader's rounding.

  Args:
    path: of the module.
    shape: [rows, row length].
    number_format: name in `formats.FORMATS`, not one with unequal steps.
    scale_dtype: 'float32' or 'bfloat16'.
  """
  kind, numpy_dtype = FLOATS[_check_dtype(scale_dtype, FLOATS)]
  rows, length = shape
  bits = affine_bits(number_format)
  middle = 2 ** (bits - 1)
  zero = formats.get(number_format).zero
  packed, scales, biases = (
      safetensors_out.Tensor(f'{path}.weight', 'U32',
                             (rows, length * bits // 32)),
      safetensors_out.Tensor(f'{path}.scales', kind, (rows, length // GROUP)),
      safetensors_out.Tensor(f'{path}.biases', kind, (rows, length // GROUP)),
  )

  def encode(piece):
    codes, scale = _rows(piece, length)
    codes = codes.astype(np.int16) + (middle - zero)
    scale = scale.astype(numpy_dtype)
    bias = scale * numpy_dtype(-middle)
    written = _groups(codes) * _column(scale) + _column(bias)
    return {
        packed.name: words(codes, bits), scales.name: scale, biases.name: bias
    }, written.reshape(np.shape(piece.quantized.codes))

  return Encoding((packed, scales, biases), {}, encode)


def affine_bits(number_format: str) -> int | None:
  """Bits a code takes in MLX: 4 or 8; None if the steps are unequal."""
  chosen = formats.get(number_format)
  if chosen.decode is not None:
    return None
  return 4 if chosen.highest - chosen.lowest < 16 else 8


def words(codes: np.ndarray, bits: int) -> np.ndarray:
  """Packs codes [rows, n] into bytes [rows, n * bits / 8].

  Of little-endian words the first code takes the lowest bits, so bytes are
  in order too, however long a word is.
  """
  codes = codes.astype(np.uint8)
  if bits == 8:
    return codes
  return codes[:, ::2] | codes[:, 1::2] << 4


def scales_fit(
    weights: checkpoints.Weights, names: list[str], dtype: str
) -> bool:
  """Whether a float type holds every scale of these weights exactly."""
  _, numpy_dtype = FLOATS[dtype]
  for name in names:
    for _, piece in weights.pieces(name):
      scale = np.asarray(piece.quantized.scale, np.float32)
      with np.errstate(over='ignore'):
        if not np.array_equal(scale.astype(numpy_dtype), scale):
          return False
  return True


def _check_dtype(dtype, allowed):
  if dtype not in allowed:
    raise errors.UserError(
        f'Unknown dtype {dtype!r}: choose one of {", ".join(allowed)}.'
    )
  return dtype


def _rows(piece, length):
  """Codes [rows, length] and scales [rows, length / 32] of a piece."""
  codes, scale = (np.asarray(a) for a in piece.quantized)
  codes = codes.reshape(-1, length)
  if formats.get(piece.format).block != GROUP:
    # One scale for all that the product sums over: the same in each group.
    scale = np.repeat(scale.reshape(-1, 1), length // GROUP, axis=1)
  return codes, scale.reshape(len(codes), -1)


def _groups(codes):
  return codes.reshape(-1, GROUP).astype(np.float32)


def _column(scale):
  return scale.astype(np.float32).reshape(-1, 1)
