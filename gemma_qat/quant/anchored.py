"""Which Q4_0 blocks come back whole from bfloat16 values quantized anew?

ggml's reference rule takes the largest magnitude of a block for level -8. It
finds codes and scale again in the block's values, even after those passed
through bfloat16, under two conditions:
  * bfloat16 and float16 both hold the scale, so that -8 times it is exact;
  * some weight has code 0, the level -8: the block is anchored. The largest
    positive level is 7, so it is this weight that the rule divides by -8.
The other weights move by up to 2^-8 of themselves in bfloat16, at most 0.028 of
a step: far from another code.
"""

import jax
import jax.numpy as jnp

from gemma_qat.quant import rounding

# The level of code 0, and the ratio weight / scale from which on it is chosen.
LOWEST = -8.0
_REACHED = -7.5
# Below this a float16 scale has steps of its own.
_SMALLEST_NORMAL = 2.0**-14
_SUBNORMAL_STEP = 2.0**-24


@jax.jit
def q4_0(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Quantizes blocks by Q4_0's reference rule, to anchored blocks.

  Unlike in `ggml.q4_0` the codes are the nearest for the rounded scale.

  Args:
    blocks: [..., 32] float32.

  Returns:
    Codes int8 [..., 32] in 0..15 and scales that bfloat16 and float16 hold,
    float32 [...]; a scale of zero comes with codes 8 and is -0.0, as in ggml.
  """
  first = jnp.argmax(jnp.abs(blocks), axis=-1, keepdims=True)
  exact = jnp.take_along_axis(blocks, first, axis=-1)[..., 0] / LOWEST
  scale = rounding.round_to_both(exact)
  # A float16 subnormal may be rounded up so far that even the peak misses
  # code 0. The next one towards zero is reached by it.
  missed = jnp.abs(exact * LOWEST) < jnp.abs(scale * _REACHED)
  lower = jnp.trunc(exact / _SUBNORMAL_STEP) * _SUBNORMAL_STEP
  scale = jnp.where(
      missed & (jnp.abs(scale) < _SMALLEST_NORMAL), lower, scale
  )
  scale = jnp.where(scale == 0, -0.0, scale)
  codes = nearest_levels(blocks, scale) - LOWEST
  return codes.astype(jnp.int8), scale


def nearest_levels(weight: jax.Array, d: jax.Array) -> jax.Array:
  """Returns code - 8 of the nearest codes, as float32 like the weight.

  Args:
    weight: float32 [..., n].
    d: scales, float32 [...], float16 values or not; 0 gives 0.
  """
  return jnp.clip(jnp.round(_ratio(weight, d)), LOWEST, 7)


def is_anchored(weight: jax.Array, d: jax.Array) -> jax.Array:
  """Whether blocks [..., n] use code 0 under the scales d [...]."""
  return jnp.min(_ratio(weight, d), axis=-1) <= _REACHED


def anchor(weight: jax.Array, d: jax.Array) -> jax.Array:
  """Returns which weight of blocks [..., n] comes nearest to level -8."""
  return jnp.argmin(_ratio(weight, d), axis=-1)


def clip_scale(weight: jax.Array, d: jax.Array) -> jax.Array:
  """Brings scales [...] to where blocks [..., n] are anchored.

  A margin of 2^-8 lets the scale be rounded to bfloat16 afterwards.
  """
  reached = _REACHED * (1 + 2.0**-8)
  highest = jnp.maximum(jnp.min(weight, axis=-1) / reached, 0.0)
  lowest = jnp.minimum(jnp.max(weight, axis=-1) / reached, 0.0)
  return jnp.clip(d, lowest, highest)


def _ratio(weight, d):
  return rounding.divide(weight, d[..., None])
