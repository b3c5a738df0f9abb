"""How do both moments of Adam fit into 8 bits each?

A block is 32 weights along the last axis, with a scale for each moment.
"""

import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

BLOCK = 32

# A float32 has 23 bits of mantissa; a second moment in 8 bits keeps 2 of them.
_EXPONENT, _DROPPED = 23, 21
# Not 127, so that a scale rounded to bfloat16 leaves no code above 127.
_LARGEST = 126


class Blocks(NamedTuple):
  """A moment in 8 bits: codes [..., C], one scale a block [..., C / 32].

  First moment: int8, bfloat16. Second: uint8, and as uint8 the exponent of the
  block's largest value, in the bits that a float32 has for it.
  """

  codes: jax.Array
  scale: jax.Array


def largest_update(b1: float, b2: float) -> float:
  """The bound of |first moment| / root of the second, for any gradients.

  By Cauchy-Schwarz over the two sums of powers; infinite unless b1^2 < b2.
  """
  if b1**2 >= b2:
    return math.inf
  return math.sqrt((1 - b1) ** 2 / (1 - b2) / (1 - b1**2 / b2))


def pack(
    first: jax.Array, second: jax.Array, bits: jax.Array, limit: float
) -> tuple[Blocks, Blocks]:
  """Keeps both moments of one leaf in 8 bits.

  Args:
    first: float32 [..., C], C a multiple of 32.
    second: float32 [..., C], not negative.
    bits: uint32 [..., C], random.
    limit: see `largest_update`.
  """
  second = _pack_second(second, bits >> (32 - _DROPPED))
  root = jnp.sqrt(_unpack_second(second))
  # The other 11 bits, as a number between 0 and 1.
  noise = ((bits & 0x7FF).astype(jnp.float32) + 0.5) / 2**11
  return _pack_first(first, root, limit, noise), second


def unpack(first: Blocks, second: Blocks) -> tuple[jax.Array, jax.Array]:
  """Returns what `pack` kept, float32."""
  values = _unpack_second(second)
  scale = first.scale.astype(jnp.float32)[..., None]
  ratio = _blocks(first.codes.astype(jnp.float32)) * scale
  return ratio.reshape(values.shape) * jnp.sqrt(values), values


def zeros(shape: tuple[int, ...]) -> tuple[Blocks, Blocks]:
  """Returns how two moments of zero are kept."""
  blocks = (*shape[:-1], shape[-1] // BLOCK)
  return (
      Blocks(jnp.zeros(shape, jnp.int8), jnp.zeros(blocks, jnp.bfloat16)),
      Blocks(jnp.zeros(shape, jnp.uint8), jnp.zeros(blocks, jnp.uint8)),
  )


def has_blocks(shape: tuple[int, ...]) -> bool:
  """Whether a leaf is whole blocks and large enough: 32 rows or more.

  Gains, one row a layer, are not: they are few and every bit of them counts.
  """
  return bool(shape) and shape[-1] % BLOCK == 0 and (
      math.prod(shape[:-1]) >= BLOCK
  )


def _pack_second(second, bits):
  """Rounds to 2 bits of mantissa, at random between the two neighbours.

  The codes count these floating-point numbers, 4 an octave, down from the
  block's exponent: 63 octaves. A weight whose gradients are 1e9 times smaller
  than its neighbours' is known as well as they are, within a step of 14 to
  25 %, that is 12 % of the root and of the update. The numbers do not move
  with the block's largest, so that what does not change stays. At random,
  since 1 - b2 of a value is less than a step: to nearest it would never leave
  its code, upwards it would never fall. On average the stored value is the
  exact one; the noise that gathers has a relative deviation of at most about
  sqrt(step / 2), whatever b2 is: a step of training adds a variance of
  (1 - b2) steps, and forgets 2 (1 - b2) of what there was. Measured: 0.23 of
  the second moment, 0.11 of its root at b2 = 0.95; 0.30 and 0.15 at 0.999.

  Too small a value would be dangerous: it is at most one step too small for
  one rounding; below the 63 octaves it is rounded up; and the update divides
  by the root of b2 x stored + (1 - b2) x gradient^2, which bounds it whatever
  is stored, see `_pack_first`. Only zero becomes zero.
  """
  numbers = _blocks(lax.bitcast_convert_type(second, jnp.uint32))
  exponent = jnp.max(numbers >> _EXPONENT, axis=-1, keepdims=True)
  rounded = (numbers + _blocks(bits)) >> _DROPPED
  codes = jnp.maximum(rounded.astype(jnp.int32) - _lowest(exponent), 1)
  codes = jnp.where(numbers == 0, 0, codes)
  return Blocks(
      codes.astype(jnp.uint8).reshape(second.shape),
      exponent[..., 0].astype(jnp.uint8),
  )


def _unpack_second(second):
  codes = _blocks(second.codes.astype(jnp.int32))
  # 4 is the smallest number that is not flushed to zero.
  numbers = jnp.maximum(codes + _lowest(second.scale[..., None]), 4)
  numbers = jnp.where(codes == 0, 0, numbers << _DROPPED)
  return lax.bitcast_convert_type(numbers, jnp.float32).reshape(
      second.codes.shape
  )


def _lowest(exponent):
  """What code 0 stands for; rounded up, the largest of a block gets 255."""
  return 4 * (exponent.astype(jnp.int32) + 1) - 255


def _pack_first(first, root, limit, noise):
  """Keeps the ratio to the stored root of the second moment, linearly.

  That is what the update uses, and it is of one size in a block however far
  the gradients are apart: rounding costs at most 1/126 of the block's largest
  update. Exact moments keep to `limit`; the stored ones are held to it within
  1 %, and so is then every update, by the same inequality.
  """
  ratio = jnp.where(root > 0, first / jnp.where(root > 0, root, 1), 0)
  ratio = _blocks(jnp.clip(ratio, -limit, limit))
  top = jnp.max(jnp.abs(ratio), axis=-1, keepdims=True)
  scale = _round_bfloat16(top / _LARGEST)
  codes = jnp.where(scale > 0, ratio / jnp.where(scale > 0, scale, 1), 0)
  codes = jnp.floor(codes + _blocks(noise))
  return Blocks(
      codes.astype(jnp.int8).reshape(first.shape),
      scale[..., 0].astype(jnp.bfloat16),
  )


def _blocks(x):
  return x.reshape(*x.shape[:-1], -1, BLOCK)


def _round_bfloat16(x):
  # A cast and back could be optimized away.
  return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
