"""Which block scales lose less of a weight than the reference rule's?"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from gemma_qat.quant import anchored
from gemma_qat.quant import formats

_Q4_0 = formats.FORMATS['q4_0']

# Candidates put the block's largest magnitude at these levels, under scales of
# both signs. Below -8 it is clipped, which pays when it is an outlier.
_LEVELS = tuple(5.5 + 0.25 * i for i in range(17))
# Of anchored blocks both the lowest and the highest weight are put there.
_ANCHORED_LEVELS = tuple(-7.5 - 0.25 * i for i in range(9))
_REFITS = 2
# Weights searched at once: bounds the memory at a few times 4 MB.
_CHUNK = 2**20


def search_q4_0(
    weight: jax.Array,
    importance: jax.Array | None = None,
    format: formats.Format = _Q4_0,
) -> formats.Quantized:
  """Chooses Q4_0 scales that minimise the weighted squared error.

  Tries a grid of scales of both signs in each block, each improved by
  alternating least squares (codes to the nearest, scale to the best for the
  codes). The reference rule's scale competes, so the error is never above its.

  Args:
    weight: float32 [R, C], C a multiple of 32.
    importance: float32 [C], the weights of the squared errors of a column (a
      mean square activation), or None for equal weights.
    format: Q4_0 or what `formats.bf16_safe` makes of it.

  Returns:
    Codes [R, C] and the format's scales [R, C / 32]; the codes are the
    nearest for the scales (`Format.codes_for`).

  Raises:
    UserError: C is not a multiple of 32.
  """
  rows, columns = weight.shape
  format.blocks(weight)  # Raises before anything is traced.
  if importance is None:
    importance = jnp.ones(columns, jnp.float32)
  chunk = max(1, min(rows, _CHUNK // columns))
  importance = jnp.asarray(importance, jnp.float32)
  scale = _search(weight, importance, chunk, format)
  return formats.Quantized(format.codes_for(weight, scale), scale)


def search_block(
    weight: jax.Array, importance: jax.Array, format: formats.Format = _Q4_0
) -> jax.Array:
  """Searches the scales of single blocks; see `search_q4_0`.

  Args:
    weight: float32 [..., 32].
    importance: float32 [..., 32], broadcast against the weight.
    format: as in `search_q4_0`.

  Returns:
    The format's scales, float32 [...]; anchored where it wants that.
  """
  reference = format.quantize(weight).scale[..., 0]
  count, candidate = _candidates(weight, format)

  def try_candidate(i, best):
    d = candidate(i)
    for _ in range(_REFITS):
      d = _refit(weight, importance, d, format)
    return _better(weight, importance, best, d, format)

  best = reference, _error(weight, importance, reference)
  refitted = _refit(weight, importance, reference, format)
  best = _better(weight, importance, best, refitted, format)
  return lax.fori_loop(0, count, try_candidate, best)[0]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _search(weight, importance, chunk, format):
  rows, columns = weight.shape
  importance = format.blocks(importance[None])
  one = lambda x: search_block(format.blocks(x), importance, format)
  whole = rows // chunk * chunk
  scale = lax.map(one, weight[:whole].reshape(-1, chunk, columns))
  scale = scale.reshape(whole, -1)
  if whole == rows:
    return scale
  return jnp.concatenate([scale, one(weight[whole:])])


def _candidates(weight, format):
  """How many scales [...] there are to try, and a function of i to them."""
  if not format.anchored:
    largest = jnp.max(jnp.abs(weight), axis=-1)
    levels = _LEVELS + tuple(-l for l in _LEVELS)
    return len(levels), lambda i: largest / jnp.asarray(levels)[i]
  lowest, highest = jnp.min(weight, axis=-1), jnp.max(weight, axis=-1)
  return 2 * len(_ANCHORED_LEVELS), lambda i: (
      jnp.where(i % 2 == 0, lowest, highest)
      / jnp.asarray(_ANCHORED_LEVELS)[i // 2]
  )


def _refit(weight, importance, d, format):
  """The best scale for the codes that are nearest under scale d."""
  levels = anchored.nearest_levels(weight, d)
  above = jnp.sum(importance * levels * weight, axis=-1)
  below = jnp.sum(importance * levels * levels, axis=-1)
  d = jnp.where(below == 0, d, above / jnp.where(below == 0, 1.0, below))
  return anchored.clip_scale(weight, d) if format.anchored else d


def _error(weight, importance, d):
  residual = weight - d[..., None] * anchored.nearest_levels(weight, d)
  return jnp.sum(importance * residual * residual, axis=-1)


def _better(weight, importance, best, d, format):
  d = format.stored_scale(d)
  error = _error(weight, importance, d)
  won = error < best[1]
  if format.anchored:
    won &= anchored.is_anchored(weight, d)
  return jnp.where(won, d, best[0]), jnp.where(won, error, best[1])
