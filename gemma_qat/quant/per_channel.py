"""How do the formats with one scale per output channel round a weight?"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from gemma_qat.quant import rounding

INT4_MAX = 7
SFP8_MAX = 1.875

# SFP8 codes are bfloat16 bits that lost mantissa bits: 5 below 2^-7, where two
# remain (bit pattern 0x3400 + 32 m), 4 from there on (0x3800 + 16 m).
_SFP8_LARGE = 0x3C00


@functools.partial(jax.jit, static_argnames='axes')
def int4(weight: jax.Array, axes: tuple[int, ...]):
  """Quantizes to symmetric int4: codes -7..7, scale absmax / 7.

  -8 is left out so that the lattice is the same for w and -w.

  Args:
    weight: float32, any shape.
    axes: the axes that share a scale.

  Returns:
    Codes int8 of the weight's shape, and scales with `axes` kept as size 1.
  """
  scale = rounding.divide(_absmax(weight, axes), INT4_MAX)
  codes = jnp.clip(jnp.round(_ratio(weight, scale)), -INT4_MAX, INT4_MAX)
  return codes.astype(jnp.int8), scale


@functools.partial(jax.jit, static_argnames='axes')
def sfp8(weight: jax.Array, axes: tuple[int, ...]):
  """Quantizes to gemma.cpp's switched float (SFP8), rescaled to 1.875.

  Encodes through bfloat16, then to nearest even. Source: gemma.cpp,
  compression/sfp_test.cc. -0, byte 0x80, is reserved and never produced.

  Args:
    weight: float32, any shape.
    axes: the axes that share a scale.

  Returns:
    The bytes as int8 of the weight's shape, and scales with `axes` kept as
    size 1.
  """
  scale = rounding.divide(_absmax(weight, axes), SFP8_MAX)
  ratio = _ratio(weight, scale)
  bits = lax.bitcast_convert_type(jnp.abs(ratio), jnp.int32)
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
  small = ((bits + 15 + ((bits >> 5) & 1)) >> 5) - 0x1A0
  # 2^-23 would be code 0, which means zero: its neighbour above stands in.
  small = jnp.where(small == 0, 1, jnp.maximum(small, 0))
  large = ((bits + 7 + ((bits >> 4) & 1)) >> 4) - 0x380
  code = jnp.minimum(jnp.where(bits < _SFP8_LARGE, small, large), 127)
  code = jnp.where((ratio < 0) & (code > 0), code - 128, code)
  return code.astype(jnp.int8), scale


def sfp8_values(codes: jax.Array) -> jax.Array:
  """Decodes SFP8 bytes (int8, any shape) to float32 in -1.875..1.875."""
  m = codes.astype(jnp.int32) & 127
  bits = jnp.where(m < 64, 0x3400 + (m << 5), 0x3800 + (m << 4))
  magnitude = lax.bitcast_convert_type(bits << 16, jnp.float32)
  magnitude = jnp.where(m == 0, 0.0, magnitude)
  return jnp.where(codes < 0, -magnitude, magnitude)


def _absmax(weight, axes):
  return jnp.max(jnp.abs(weight), axis=axes, keepdims=True)


def _ratio(weight, scale):
  return jnp.where(scale == 0, 0.0, weight / jnp.where(scale == 0, 1.0, scale))
