"""Which values does each position gather, and at what cost?

A local layer costs its window and a global one half the square: queries go in
blocks, and a block reads only keys that one of its queries may see. Axis
letters as in `layers.py`.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

# 'mapped' and 'blockwise' are this file's, the others JAX's.
IMPLEMENTATIONS = ('mapped', 'blockwise', 'xla', 'cudnn')

# Blocks serve every length: up to 256 positions they took the time of whole
# scores, from there less. Forward and backward of the 270M heads (N = 4, K = 1,
# H = 256), float32 on a busy 2-core CPU, whole scores / 'mapped' in ms:
#   L                512          1024          2048            4096
#   window 512   220 / 172    1030 / 472    3656 /  904    16833 /  2288
#   global       (as above)    798 / 532    3802 / 2090    19756 / 11032

# Rows of keys come in multiples of this: the tiles of matrix units.
_TILE = 128
# A block has this many rows, heads times queries, where the window is wide
# enough. On a 2-core CPU 256 to 1024 rows took the same time within 10 %.
_ROWS = 512
# A global layer is cut into so many pieces of ever longer keys: 8 do 9/16 of
# the square, 16 would do 17/32 in a program twice as long.
_PIECES = 8


def visible(positions, key_positions, window):
  """Says which keys each query may see: no later ones, none out of the window.

  Args:
    positions: int [B, L].
    key_positions: int [B, S].
    window: number of positions seen, the query's own included; None for all.

  Returns:
    bool [B, 1, L, S].
  """
  distance = positions[:, :, None] - key_positions[:, None, :]
  mask = distance >= 0
  if window is not None:
    mask &= distance < window
  return mask[:, None]


def attend(q, k, v, window, dtype, implementation):
  """Causal attention of a whole sequence, grouped-query heads.

  Args:
    q: [B, L, N, H], already scaled.
    k: [B, L, K, H].
    v: [B, L, K, H].
    window: see `visible`; static, so that no work is done outside of it.
    dtype: of the operands of matrix products.
    implementation: one of IMPLEMENTATIONS.
      'blockwise': all heads at once. Where batch and heads are cut over
        devices, each device works on its own part.
      'mapped': the same blocks, one key/value head after the other, for one
        CPU: its kernels take plain matrix products, not batched ones. Forward
        and backward on a busy 2-core CPU, float32, window 512, 'blockwise' in
        units of 'mapped': 1.5 for N = 8, K = 4, L = 1024; 1.0 for K = 1. In
        bfloat16 on a CPU with AMX plain products were 4 times faster.
      'xla': JAX's own, with all L x S scores.
      'cudnn': the flash kernel of NVIDIA GPUs, for bfloat16; see
        `why_not_cudnn`. Sharded, q, k and v must be cut alike, over batch and
        heads alone.

  Returns:
    float32 [B, L, N, H].
  """
  b, l, n, h = q.shape
  if window is not None and window >= l:
    window = None
  if implementation not in ('mapped', 'blockwise'):
    out = jax.nn.dot_product_attention(
        q.astype(dtype), k.astype(dtype), v.astype(dtype),
        scale=1.0,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return out.astype(jnp.float32)
  heads = k.shape[2]
  # Gradients leave `one_head` in float32, whatever the products' dtype.
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  q = q.reshape(b, l, heads, n // heads, h)
  one_head = lambda q, k, v: _one_head(q, k, v, window, dtype)
  if implementation == 'blockwise':
    all_heads = jax.vmap(one_head, in_axes=1, out_axes=1)
    return jax.vmap(all_heads)(q, k, v).reshape(b, l, n, h)
  flat = lambda x: jnp.moveaxis(x, 2, 1).reshape(b * heads, l, *x.shape[3:])
  out = lax.map(lambda qkv: one_head(*qkv), (flat(q), flat(k), flat(v)))
  out = out.reshape(b, heads, l, n // heads, h)
  return jnp.moveaxis(out, 1, 2).reshape(b, l, n, h)


def attend_cached(q, k, v, mask, dtype):
  """Attention over a key/value cache with an explicit mask.

  Shapes as in `attend`, with k, v [B, S, K, H] and mask [B, 1, L, S].
  """
  out = jax.nn.dot_product_attention(
      q.astype(dtype), k.astype(dtype), v.astype(dtype), mask=mask, scale=1.0
  )
  return out.astype(jnp.float32)


def why_not_cudnn(
    num_heads: int, num_kv_heads: int, head_dim: int, window: int, dtype
) -> str | None:
  """Tries cuDNN's kernels, forward and backward, on a short random sequence.

  What they serve depends on GPU and version: backward with heads wider than
  128 takes Hopper and cuDNN 9.5, or Blackwell and 9.23. JAX checks a part of
  that, the rest shows when XLA compiles; so ask them.

  Returns:
    None if they work, else the first line of what they say.
  """
  length = 2 * window
  shape = lambda heads: jnp.ones((1, length, heads, head_dim), jnp.float32)
  qkv = shape(num_heads), shape(num_kv_heads), shape(num_kv_heads)
  try:
    for reach in (window, None):
      total = lambda q, k, v, reach=reach: jnp.sum(
          attend(q, k, v, reach, dtype, 'cudnn')
      )
      out = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*qkv)
      jax.block_until_ready(out)
  except (RuntimeError, ValueError) as error:  # XLA's errors are the former.
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
  return None


class _Run(NamedTuple):
  """Blocks of queries, one after the other, that read equally many keys.

  Attributes:
    start: the first query.
    block: queries a block.
    count: blocks.
    reach: keys a block reads: those up to its last query, or, where these are
      fewer, the first ones of the sequence.
  """

  start: int
  block: int
  count: int
  reach: int

  def first_query(self, i):
    """Of the i-th block."""
    return self.start + self.block * i

  def first_key(self, i):
    """Of the i-th block."""
    return jnp.maximum(self.first_query(i + 1) - self.reach, 0)


def _runs(length: int, window: int | None, group: int) -> list[_Run]:
  """Cuts a sequence: growing reach, then the window's, then the rest."""
  window = length if window is None else window
  block = min(_ROWS // group, window // 4)
  block = max(block - block % _TILE, _TILE)
  widest = _whole_tiles(block + window - 1)
  count = length // block
  growing = min(count, (widest - 1) // block)
  # Two blocks at least: a loop keeps one block's scores, straight code all.
  step = max(2, math.ceil(growing / _PIECES))
  runs = []
  for i in range(0, growing, step):
    j = min(i + step, growing)
    runs.append(_Run(i * block, block, j - i, j * block))
  if count > growing:
    runs.append(_Run(growing * block, block, count - growing, widest))
  rest = length % block
  if rest:
    reach = min(_whole_tiles(rest + window - 1), length)
    runs.append(_Run(length - rest, rest, 1, reach))
  return runs


def _whole_tiles(length):
  return math.ceil(length / _TILE) * _TILE


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _one_head(q, k, v, window, dtype):
  """float32 q [L, G, H], k [L, H], v [L, H] -> float32 [L, G, H]."""
  return _forward(q, k, v, window, dtype)[0]


def _forward(q, k, v, window, dtype):
  # Only q, k and v are kept for the backward pass, which computes a block's
  # scores anew: with their log-sum too it was no faster on a CPU, and no policy
  # of rematerialisation can want scores that nothing later needs.
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  # The output goes from block to block, so that no two of them run at once.
  out = jnp.zeros(q.shape, jnp.float32)
  for run in _runs(len(q), window, q.shape[1]):
    def step(out, i, run=run):
      at, first = run.first_query(i), run.first_key(i)
      keys, values = (_rows(x, first, run.reach) for x in (k, v))
      exps, total = _softmax(
          _rows(q, at, run.block), keys, at - first, window
      )
      block = _product('lgs,sh->lgh', exps.astype(dtype), values) / total
      return lax.dynamic_update_slice_in_dim(out, block, at, 0), None
    out, _ = lax.scan(step, out, jnp.arange(run.count))
  return out, (q, k, v)


def _backward(window, dtype, saved, g):
  # Else XLA may find the scores of the forward pass, equal, and keep them.
  (q, k, v), g = lax.optimization_barrier((saved, g.astype(dtype)))
  sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
  for run in _runs(len(q), window, q.shape[1]):
    def step(sums, i, run=run):
      at, first = run.first_query(i), run.first_key(i)
      queries, dout = (_rows(x, at, run.block) for x in (q, g))
      keys, values = (_rows(x, first, run.reach) for x in (k, v))
      exps, total = _softmax(queries, keys, at - first, window)
      weights = exps / total
      dweights = _product('lgh,sh->lgs', dout, values)
      mean = jnp.sum(weights * dweights, axis=-1, keepdims=True)
      dscores = (weights * (dweights - mean)).astype(dtype)
      dq, dk, dv = sums
      return (
          _add(dq, at, _product('lgs,sh->lgh', dscores, keys)),
          _add(dk, first, _product('lgs,lgh->sh', dscores, queries)),
          _add(dv, first, _product('lgs,lgh->sh', weights.astype(dtype), dout)),
      ), None
    sums, _ = lax.scan(step, sums, jnp.arange(run.count))
  return sums


_one_head.defvjp(_forward, _backward)


def _softmax(q, keys, ahead, window):
  """exp(scores - their maximum) [l, G, s], and their sums.

  The first query of the block stands `ahead` of its first key.
  """
  scores = _product('lgh,sh->lgs', q, keys)
  positions = ahead + jnp.arange(len(q))
  mask = visible(positions[None], jnp.arange(len(keys))[None], window)[0, 0]
  scores = jnp.where(mask[:, None], scores, -jnp.inf)
  exps = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  return exps, jnp.sum(exps, axis=-1, keepdims=True)


def _rows(x, start, count):
  return lax.dynamic_slice_in_dim(x, start, count)


def _add(x, start, rows):
  old = lax.dynamic_slice_in_dim(x, start, len(rows))
  return lax.dynamic_update_slice_in_dim(x, old + rows, start, 0)


def _product(equation, x, y):
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
