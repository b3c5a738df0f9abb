"""Which bytes does ggml's reference quantizer make of a block of 32 weights?

The rules follow `quantize_row_q4_0_ref` and `quantize_row_q8_0_ref` in
ggml-quants.c (llama.cpp) to the last bit, jitted or not. Three things stand in
the way of a literal transcription:
  * XLA flushes float32 subnormals. Blocks below 2^-118 are therefore counted
    in units of 2^-149, the float32 subnormal step, in which they are integers.
  * `x * id + 8.5` becomes a fused multiply-add under jit, which rounds once
    instead of twice. A clip between the two keeps them apart.
  * Divisions are not IEEE's everywhere: see `rounding.divide`.
"""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from gemma_qat.quant import rounding

BLOCK = 32

# Bit patterns of float32 magnitudes; integers order like the floats.
_SMALLEST_NORMAL = 0x0080_0000
# 2^-118: from there on a subnormal weight is below half a step of Q8_0.
_TINY = 0x0480_0000
# 1 / d overflows float32 up to d = 2^-128, which is 2^21 units.
_LARGEST_WITHOUT_INVERSE = 2.0**21


@jax.jit
def q4_0(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Quantizes blocks by Q4_0's reference rule.

  Args:
    blocks: [..., 32] float32.

  Returns:
    Codes int8 [..., 32] in 0..15 and the float16-rounded scale, float32
    [...]. Codes come from the scale before that rounding, as in C.
  """
  lifted, tiny, magnitude = _lift(blocks)
  first = jnp.argmax(magnitude, axis=-1, keepdims=True)
  peak = jnp.take_along_axis(lifted, first, axis=-1)
  # C starts its search at +0.0, so a block of -0.0 ends there, too.
  peak = jnp.where(peak == 0, 0.0, peak)
  d = peak / -8
  d = jnp.where(tiny, jnp.round(d), d)
  scaled = jnp.clip(lifted * _inverse(d), -8.0, 8.0)
  codes = jnp.minimum(15, jnp.trunc(scaled + 8.5))
  # In C the codes become infinite there, which x86 converts to 0.
  codes = jnp.where(_without_inverse(d, tiny), 0, codes)
  scale = jnp.where(tiny, jnp.copysign(0.0, d), d)[..., 0]
  return codes.astype(jnp.int8), rounding.round_to_float16(scale)


@jax.jit
def q8_0(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Quantizes blocks by Q8_0's reference rule.

  Args:
    blocks: [..., 32] float32.

  Returns:
    Codes int8 [..., 32] in -127..127 and the float16-rounded scale, float32
    [...]. Codes come from the scale before that rounding, as in C.
  """
  lifted, tiny, _ = _lift(blocks)
  peak = jnp.max(jnp.abs(lifted), axis=-1, keepdims=True)
  # A subnormal scale is a whole number of units.
  subnormal = tiny & (peak < 127 * 2.0**23)
  units = jnp.where(subnormal, peak, 0).astype(jnp.int32)
  units = ((2 * units + 127) // 254).astype(jnp.float32)
  d = jnp.where(subnormal, units, rounding.divide(peak, 127))
  # Half away from zero, as C's roundf.
  codes = lax.round(lifted * _inverse(d), lax.RoundingMethod.AWAY_FROM_ZERO)
  codes = jnp.where(_without_inverse(d, tiny), 0, codes)
  scale = jnp.where(tiny, 0.0, d)[..., 0]
  return codes.astype(jnp.int8), rounding.round_to_float16(scale)


def pack_q4_0(codes: np.ndarray) -> np.ndarray:
  """Packs codes [n, 32] into bytes [n, 16]: j below, j + 16 above."""
  codes = codes.astype(np.uint8)
  return codes[:, :16] | (codes[:, 16:] << 4)


def unpack_q4_0(packed: np.ndarray) -> np.ndarray:
  """Undoes `pack_q4_0`: bytes [n, 16] to int8 codes [n, 32]."""
  return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.int8)


def pack_q8_0(codes: np.ndarray) -> np.ndarray:
  """Packs codes [n, 32] into bytes [n, 32]: the int8 bit patterns."""
  return codes.view(np.uint8)


def unpack_q8_0(packed: np.ndarray) -> np.ndarray:
  """Undoes `pack_q8_0`: bytes [n, 32] to int8 codes [n, 32]."""
  return packed.view(np.int8)


def _lift(blocks):
  """Counts tiny blocks in units of 2^-149; also says which ones are tiny.

  Returns the blocks, the mask [..., 1] and the magnitudes as integers.
  """
  bits = lax.bitcast_convert_type(blocks, jnp.int32)
  magnitude = bits & 0x7FFF_FFFF
  tiny = jnp.max(magnitude, axis=-1, keepdims=True) < _TINY
  subnormal = jnp.where(bits < 0, -magnitude, magnitude).astype(jnp.float32)
  # In the exponent: XLA joins two float factors into one, which overflows.
  normal = lax.bitcast_convert_type(bits + (149 << 23), jnp.float32)
  units = jnp.where(magnitude < _SMALLEST_NORMAL, subnormal, normal)
  return jnp.where(tiny, units, blocks), tiny, magnitude


def _inverse(d):
  return rounding.divide(jnp.ones_like(d), d)


def _without_inverse(d, tiny):
  return tiny & (d != 0) & (jnp.abs(d) <= _LARGEST_WITHOUT_INVERSE)
