"""Which numbers does gemma.cpp's switched 8-bit float (SFP8) know?

A byte is a sign and seven bits m: 0 is zero; 1..63 hold an exponent and two
mantissa bits (bfloat16 bits 0x3400 + 32 m, from 1.25 * 2^-23 to 1.75 * 2^-8),
64..127 an exponent and three (0x3800 + 16 m, from 2^-7 to 1.875). Byte 0x80
is reserved. Source: gemma.cpp, compression/types.h and sfp_test.cc.
"""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

MAX = 1.875

# The bfloat16 bits of 2^-7, where three mantissa bits begin to be kept.
_LARGE = 0x3C00


def encode(x: jax.Array) -> jax.Array:
  """Rounds to the nearest SFP8 number, through bfloat16, ties to even.

  gemma.cpp's own encoder drops all bits beyond the first six of the mantissa
  before it rounds, and so takes what lies just above a tie for one. Of normal
  values 6 % get the other neighbour there, which makes its mean squared error
  9 % larger (measured); its decoder reads either.

  Args:
    x: float32, any shape; magnitudes beyond `MAX` become `MAX`.

  Returns:
    The bytes as int8, same shape; 0x80 is never among them.
  """
  bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
  small = ((bits + 15 + ((bits >> 5) & 1)) >> 5) - 0x1A0
  # 2^-23 would be code 0, which means zero: its neighbour above stands in.
  small = jnp.where(small == 0, 1, jnp.maximum(small, 0))
  large = ((bits + 7 + ((bits >> 4) & 1)) >> 4) - 0x380
  code = jnp.minimum(jnp.where(bits < _LARGE, small, large), 127)
  code = jnp.where((x < 0) & (code > 0), code - 128, code)
  return code.astype(jnp.int8)


def decode(codes: jax.Array) -> jax.Array:
  """Decodes SFP8 bytes (int8, any shape) to float32 in -1.875..1.875."""
  m = codes.astype(jnp.int32) & 127
  bits = jnp.where(m < 64, 0x3400 + (m << 5), 0x3800 + (m << 4))
  magnitude = lax.bitcast_convert_type(bits << 16, jnp.float32)
  magnitude = jnp.where(m == 0, 0.0, magnitude)
  return jnp.where(codes < 0, -magnitude, magnitude)


def tensor_scale(absmax: float) -> np.float32:
  """Returns the one scale that gemma.cpp gives a whole tensor.

  1 where the largest magnitude fits already: gemma.cpp never scales up.
  """
  return max(np.float32(1), np.float32(absmax) / np.float32(MAX))
