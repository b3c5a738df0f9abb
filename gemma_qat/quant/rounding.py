"""Which roundings have to come out as in C, whatever XLA rewrites?"""

import jax
from jax import lax
import jax.numpy as jnp

_SMALLEST_NORMAL = 2.0**-14
_SUBNORMAL_STEP = 2.0**-24
_OVERFLOW = 2.0**16


@jax.custom_vjp
def round_to_float16(x: jax.Array) -> jax.Array:
  """Rounds float32 to the nearest float16 value, ties to even, kept float32.

  The gradient passes straight through. Not written as two casts: XLA may drop
  a pair of casts (xla_allow_excess_precision) and reduce_precision flushes
  float16 subnormals, which small blocks of real weights do have as scales.

  Args:
    x: float32, any shape.

  Returns:
    float32 of the same shape, bit-equal to numpy's cast to float16 and back.
  """
  bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
  odd = (bits >> 13) & 1
  normal = lax.bitcast_convert_type(
      (bits + 0xFFF + odd) & ~0x1FFF, jnp.float32
  )
  normal = jnp.where(normal >= _OVERFLOW, jnp.inf, normal)
  subnormal = jnp.round(jnp.abs(x) / _SUBNORMAL_STEP) * _SUBNORMAL_STEP
  y = jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, subnormal, normal)
  return jnp.where(jnp.isnan(x), x, jnp.copysign(y, x))


@jax.custom_vjp
def round_to_bfloat16(x: jax.Array) -> jax.Array:
  """Rounds float32 to the nearest bfloat16 value, ties to even, kept float32.

  The gradient passes straight through; not two casts, as above.

  Args:
    x: float32, any shape.

  Returns:
    float32 of the same shape, bit-equal to ml_dtypes' cast and back.
  """
  bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
  odd = (bits >> 16) & 1
  y = lax.bitcast_convert_type((bits + 0x7FFF + odd) & ~0xFFFF, jnp.float32)
  return jnp.where(jnp.isnan(x), x, jnp.copysign(y, x))


def round_to_both(x: jax.Array) -> jax.Array:
  """Rounds float32 to bfloat16, then to float16: a value that both can hold.

  float16 has more bits than bfloat16 where it is normal; its subnormals only
  take bits away. In this order nothing has to be rounded a third time.
  """
  return round_to_float16(round_to_bfloat16(x))


def float16_bits(x: jax.Array) -> jax.Array:
  """Returns the bits of float32 numbers that float16 holds exactly.

  By integer arithmetic: casts of subnormals are flushed on some backends, and
  pairs of casts dropped.

  Args:
    x: float32, float16 values; no NaN.

  Returns:
    uint16 of the same shape.
  """
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  size = bits & 0x7FFFFFFF
  magnitude = lax.bitcast_convert_type(size, jnp.float32)
  # 112: the biases of the exponents are 127 and 15.
  normal = (size >> 13) - (112 << 10)
  subnormal = (magnitude / _SUBNORMAL_STEP).astype(jnp.uint32)
  y = jnp.where(magnitude < _SMALLEST_NORMAL, subnormal, normal)
  y = jnp.where(jnp.isinf(magnitude), 0x7C00, y)
  return (y | ((bits >> 16) & 0x8000)).astype(jnp.uint16)


def from_float16_bits(bits: jax.Array) -> jax.Array:
  """Undoes `float16_bits`: uint16 to float32 of the same shape."""
  bits = bits.astype(jnp.uint32)
  size = bits & 0x7FFF
  normal = lax.bitcast_convert_type(
      (size << 13) + (112 << 23), jnp.float32
  )
  y = jnp.where(size < 0x400, size.astype(jnp.float32) * _SUBNORMAL_STEP, normal)
  y = jnp.where(size >= 0x7C00, jnp.inf, y)
  return jnp.where(bits >> 15 == 1, -y, y)


def divide(x: jax.Array, divisor: float) -> jax.Array:
  """Divides x >= 0 by a constant with one rounding, as IEEE and C do.

  XLA turns division by a constant into multiplication by its rounded inverse
  (4.5 % of x / 127 differ then); it leaves a divisor alone that hangs on data.
  """
  return x / jnp.where(x > 0, divisor, 1.0)


def _backward(_, gradient):
  return (gradient,)


round_to_float16.defvjp(lambda x: (round_to_float16(x), None), _backward)
round_to_bfloat16.defvjp(lambda x: (round_to_bfloat16(x), None), _backward)
