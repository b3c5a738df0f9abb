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


def divide(x: jax.Array, divisor: jax.Array | float) -> jax.Array:
  """Divides with one rounding, as IEEE and C do, on every backend.

  Not so a plain division: on GPUs and TPUs it may be off by two units in the
  last place, and everywhere XLA turns division by a constant into
  multiplication by its rounded inverse (4.5 % of x / 127 differ then).

  Args:
    x: float32.
    divisor: float32 that broadcasts with x.

  Returns:
    float32 of the common shape; 0 where the divisor is 0.
  """
  # XLA leaves a divisor alone that hangs on data.
  safe = jnp.where((x != 0) & (divisor != 0), divisor, 1.0)
  safe = safe.astype(jnp.float32)
  quotient = lax.platform_dependent(
      jnp.broadcast_to(x, safe.shape), safe,
      cpu=lambda x, y: x / y,
      default=lambda x, y: nearest_quotient(x, y, x / y),
  )
  return jnp.where(divisor == 0, 0.0, quotient)


def nearest_quotient(
    x: jax.Array, y: jax.Array, about: jax.Array
) -> jax.Array:
  """Finds the float32 nearest to x / y.

  By sums and products that float32 holds exactly: joined to fused
  multiply-adds or not, they are the same.

  Args:
    x, y: float32 of one shape.
    about: x / y but for two units in the last place. It is the result where
      it, x or y is subnormal, zero, infinite or NaN.

  Returns:
    float32 of the same shape.
  """
  bits = [lax.bitcast_convert_type(v, jnp.int32) for v in (x, y, about)]
  exponents = [(b >> 23) & 0xFF for b in bits]
  x_one, y_one = (
      lax.bitcast_convert_type((b & 0x7F_FFFF) | 0x3F80_0000, jnp.float32)
      for b in bits[:2]
  )
  # About x_one / y_one, 1/2 .. 2: the exponents of x and y taken off.
  shift = exponents[0] - exponents[1]
  near = (bits[2] & 0x7FFF_FFFF) - (shift << 23)

  def lost(near):
    """x_one - near * y_one, exact while near is off by a unit or two."""
    q = lax.bitcast_convert_type(near, jnp.float32)
    # Halves of 12 bits: their products fit into 24.
    q_high, y_high = (
        lax.bitcast_convert_type(b & ~0xFFF, jnp.float32)
        for b in (near, (bits[1] & 0x7F_FFFF) | 0x3F80_0000)
    )
    q_low, y_low = q - q_high, y_one - y_high
    rest = (x_one - q_high * y_high) - q_high * y_low
    return jnp.abs((rest - q_low * y_high) - q_low * y_low)

  best, least = near, lost(near)
  for step in (-2, -1, 1, 2):
    other = lost(near + step)
    best = jnp.where(other < least, near + step, best)
    least = jnp.minimum(other, least)
  # The sign and the exponent come back.
  found = (best + (shift << 23)) | (bits[2] & jnp.int32(-(2**31)))
  is_normal = jnp.all(jnp.stack([(e > 0) & (e < 255) for e in exponents]), 0)
  return jnp.where(
      is_normal, lax.bitcast_convert_type(found, jnp.float32), about
  )


def _backward(_, gradient):
  return (gradient,)


round_to_float16.defvjp(lambda x: (round_to_float16(x), None), _backward)
round_to_bfloat16.defvjp(lambda x: (round_to_bfloat16(x), None), _backward)
