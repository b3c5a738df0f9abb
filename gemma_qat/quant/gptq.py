"""Which codes lose least of a layer's output, rounding errors traded off?"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from gemma_qat import errors
from gemma_qat.quant import anchored
from gemma_qat.quant import descent
from gemma_qat.quant import formats
from gemma_qat.quant import rules
from gemma_qat.quant import search

_Q4_0 = formats.FORMATS['q4_0']
# Share of the mean diagonal that is added to the diagonal.
DAMPING = 0.01


def gptq_q4_0(
    weight: jax.Array,
    hessian: np.ndarray,
    damping: float = DAMPING,
    format: formats.Format = _Q4_0,
    passes: int = descent.PASSES,
) -> formats.Quantized:
  """Rounds column after column; later columns make up for earlier errors.

  Blocks go in the order of their inputs' mean square, and so do the columns in
  a block: what matters most is rounded first, and the rest makes up for it. A
  block's scales are searched (`search.search_block`) on the weights as
  compensated so far, with the Hessian's diagonal as importance. An anchored
  format has the weight nearest to level -8 get it, even if its compensation led
  away from there. Source: Frantar et al., GPTQ.

  Rows do not depend on each other: stack matrices that share their inputs
  (query, key and value; gate and up) to factor the Hessian once. On a busy
  machine OPENBLAS_NUM_THREADS=1 makes that factorisation five times faster.

  Args:
    weight: float32 [R, C], C a multiple of 32.
    hessian: [C, C], sum or mean of x x^T over the layer's inputs x.
    damping: share of the mean diagonal that is added to the diagonal.
    format: Q4_0 or what `formats.bf16_safe` makes of it.
    passes: of coordinate descent afterwards, see `descent`; 0 is GPTQ alone.

  Returns:
    Codes [R, C] and the format's scales [R, C / 32].

  Raises:
    UserError: C is not a multiple of 32, or the Hessian is not finite, not
      C x C, or not positive semidefinite.
  """
  columns = weight.shape[1]
  if columns % format.block or hessian.shape != (columns, columns):
    raise errors.UserError(
        f'A weight of shape {tuple(weight.shape)} needs rows that are a '
        f'multiple of {format.block} and a Hessian of {columns} x {columns}, '
        f'not of shape {tuple(hessian.shape)}.'
    )
  rules.check_finite('The Hessian', hessian)
  importance = np.diag(hessian).astype(np.float32)
  order = _order(importance.reshape(-1, format.block))
  hessian = damped(hessian, damping)
  hessian = hessian[np.ix_(order, order)]
  weight = jnp.asarray(weight, jnp.float32)[:, order]
  found = formats.Quantized(*_round(
      weight, jnp.asarray(importance[order]),
      _inverse_factor(hessian, damping), format,
  ))
  codes, scale = descent.descend(weight, hessian, found, format, passes)
  blocks = order[:: format.block] // format.block
  return formats.Quantized(
      codes[:, np.argsort(order)], scale[:, np.argsort(blocks)]
  )


def _order(importance):
  """Columns [C], largest first, blocks [C / 32, 32] staying together."""
  blocks = np.argsort(-importance.sum(axis=1), kind='stable')
  inside = np.argsort(-importance[blocks], axis=1, kind='stable')
  return (blocks[:, None] * importance.shape[1] + inside).reshape(-1)


def damped(hessian: np.ndarray, damping: float = DAMPING) -> np.ndarray:
  """Adds a share of the mean diagonal, float64 [C, C]; the identity to zeros.
  """
  hessian = np.asarray(hessian, np.float64)
  mean = np.trace(hessian) / len(hessian)
  return hessian + np.eye(len(hessian)) * (damping * mean if mean else 1.0)


def _inverse_factor(hessian, damping):
  """The upper U with U^T U = H^-1, rows divided by their diagonal.

  Row j then says how a unit error in column j is spread over later columns.
  """
  # H = L^T L with lower L, found by flipping, gives U = L^-T without forming
  # the inverse: one factorisation less and none of its rounding.
  try:
    flipped = scipy.linalg.cholesky(
        hessian[::-1, ::-1], lower=False, check_finite=False
    )
  except scipy.linalg.LinAlgError as e:
    raise errors.UserError(
        'The Hessian is not positive semidefinite: raise the damping '
        f'({damping}) or collect it from more text.'
    ) from e
  lower = np.ascontiguousarray(flipped[::-1, ::-1])
  upper, _ = scipy.linalg.lapack.dtrtri(lower, lower=1)
  upper = upper.T
  return jnp.asarray(upper / np.diag(upper)[:, None], jnp.float32)


@functools.partial(jax.jit, static_argnums=3)
def _round(weight, importance, factor, format):
  rows, columns = weight.shape
  width = format.block
  blocks = columns // width
  position = jnp.arange(columns)

  def one_block(b, carry):
    rest, codes, scales = carry
    start = b * width
    block = lax.dynamic_slice(rest, (0, start), (rows, width))
    weights = lax.dynamic_slice(importance, (start,), (width,))
    scale = search.search_block(block, weights[None], format)
    spread = lax.dynamic_slice(factor, (start, start), (width, width))
    block_codes, error = _round_block(block, scale, spread, format)
    # Everything right of the block pays for its errors at once.
    later = lax.dynamic_slice(factor, (start, 0), (width, columns))
    later = jnp.where(position[None] >= start + width, later, 0.0)
    return (
        rest - error @ later,
        lax.dynamic_update_slice(codes, block_codes, (0, start)),
        lax.dynamic_update_slice(scales, scale[:, None], (0, b)),
    )

  start = (
      weight,
      jnp.zeros((rows, columns), jnp.int8),
      jnp.zeros((rows, blocks), jnp.float32),
  )
  return lax.fori_loop(0, blocks, one_block, start)[1:]


def _round_block(block, scale, spread, format):
  """Rounds 32 columns in turn; returns codes and errors [R, 32]."""
  columns = jnp.arange(block.shape[1])
  anchor = anchored.anchor(block, scale)

  def one_column(carry, j):
    # Columns lie in rows here, where they are contiguous.
    column = carry[j]
    levels = anchored.nearest_levels(column[:, None], scale)[:, 0]
    if format.anchored:
      here = (anchor == j) & (scale != 0)
      levels = jnp.where(here, anchored.LOWEST, levels)
    lost = column - scale * levels
    later = jnp.where(columns > j, spread[j], 0.0)
    return carry - later[:, None] * lost[None], (levels + 8, lost)

  _, (codes, lost) = lax.scan(one_column, block.T, columns)
  return codes.T.astype(jnp.int8), lost.T
