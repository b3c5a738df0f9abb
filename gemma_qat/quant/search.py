"""Which block scales lose less of a weight than the reference rule's?"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from gemma_qat.quant import formats

_Q4_0 = formats.FORMATS['q4_0']

# Candidates put the block's largest magnitude at these levels, under scales of
# both signs. Below -8 it is clipped, which pays when it is an outlier.
_LEVELS = tuple(5.5 + 0.25 * i for i in range(17))
_REFITS = 2
# Weights searched at once: bounds the memory at a few times 4 MB.
_CHUNK = 2**20


def search_q4_0(
    weight: jax.Array, importance: jax.Array | None = None
) -> formats.Quantized:
  """Chooses Q4_0 scales that minimise the weighted squared error.

  Tries a grid of scales of both signs in each block, each improved by
  alternating least squares (codes to the nearest, scale to the best for the
  codes). The reference rule's scale competes, so the error is never above its.

  Args:
    weight: float32 [R, C], C a multiple of 32.
    importance: float32 [C], the weights of the squared errors of a column (a
      mean square activation), or None for equal weights.

  Returns:
    Codes [R, C] and float16-valued scales [R, C / 32]; the codes are the
    nearest for the scales (`Format.codes_for`).

  Raises:
    UserError: C is not a multiple of 32.
  """
  rows, columns = weight.shape
  _Q4_0.blocks(weight)  # Raises before anything is traced.
  if importance is None:
    importance = jnp.ones(columns, jnp.float32)
  chunk = max(1, min(rows, _CHUNK // columns))
  scale = _search(weight, jnp.asarray(importance, jnp.float32), chunk)
  return formats.Quantized(_Q4_0.codes_for(weight, scale), scale)


def search_block(weight: jax.Array, importance: jax.Array) -> jax.Array:
  """Searches the scales of single blocks; see `search_q4_0`.

  Args:
    weight: float32 [..., 32].
    importance: float32 [..., 32], broadcast against the weight.

  Returns:
    float16-valued scales, float32 [...].
  """
  reference = _Q4_0.quantize(weight).scale[..., 0]
  largest = jnp.max(jnp.abs(weight), axis=-1)

  def try_candidate(i, best):
    level = jnp.asarray(_LEVELS + tuple(-l for l in _LEVELS))[i]
    d = largest / level
    for _ in range(_REFITS):
      d = _refit(weight, importance, d)
    return _better(weight, importance, best, d)

  best = reference, _error(weight, importance, reference)
  best = _better(
      weight, importance, best, _refit(weight, importance, reference)
  )
  return lax.fori_loop(0, 2 * len(_LEVELS), try_candidate, best)[0]


def nearest_levels(weight: jax.Array, d: jax.Array) -> jax.Array:
  """Returns code - 8 of the nearest codes, as float32 like the weight.

  Args:
    weight: float32 [..., n].
    d: scales, float32 [...], float16 values or not; 0 gives 0.
  """
  d = d[..., None]
  ratio = jnp.where(d == 0, 0.0, weight / jnp.where(d == 0, 1.0, d))
  return jnp.clip(jnp.round(ratio), -8, 7)


@functools.partial(jax.jit, static_argnums=2)
def _search(weight, importance, chunk):
  rows, columns = weight.shape
  importance = _Q4_0.blocks(importance[None])
  one = lambda x: search_block(_Q4_0.blocks(x), importance)
  whole = rows // chunk * chunk
  scale = lax.map(one, weight[:whole].reshape(-1, chunk, columns))
  scale = scale.reshape(whole, -1)
  if whole == rows:
    return scale
  return jnp.concatenate([scale, one(weight[whole:])])


def _refit(weight, importance, d):
  """The best scale for the codes that are nearest under scale d."""
  levels = nearest_levels(weight, d)
  above = jnp.sum(importance * levels * weight, axis=-1)
  below = jnp.sum(importance * levels * levels, axis=-1)
  return jnp.where(below == 0, d, above / jnp.where(below == 0, 1.0, below))


def _error(weight, importance, d):
  residual = weight - d[..., None] * nearest_levels(weight, d)
  return jnp.sum(importance * residual * residual, axis=-1)


def _better(weight, importance, best, d):
  d = _Q4_0.stored_scale(d)
  error = _error(weight, importance, d)
  won = error < best[1]
  return jnp.where(won, d, best[0]), jnp.where(won, error, best[1])
