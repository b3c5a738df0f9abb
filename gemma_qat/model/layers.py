"""What does each piece of a Gemma 3 layer compute?

Axis letters, the same in every einsum, docstring and comment of the project:
  B batch, L query positions, S key positions, D width, V vocabulary,
  N query heads, K key/value heads, H head width, F MLP width.

Pure functions of arrays. The residual stream and everything elementwise keep
the dtype they come in; the operands of matrix products are cast to the
product's own dtype and accumulated in float32.
"""

import functools
import math

import jax
from jax import lax
import jax.numpy as jnp


def contract(x, weight, contraction, dtype):
  """Multiplies activations with a matrix stored [outputs..., inputs...].

  Args:
    x: [..., inputs...].
    weight: [outputs..., inputs...].
    contraction: number of input axes.
    dtype: what both operands are cast to.

  Returns:
    float32 [..., outputs...].
  """
  lead, outputs = x.shape[:-contraction], weight.shape[:-contraction]
  length = math.prod(weight.shape[-contraction:])
  out = _rows_product(
      x.reshape(-1, length), weight.reshape(-1, length), dtype
  )
  return out.reshape(lead + outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows_product(x, weight, dtype):
  """x [T, C] times weight [R, C] transposed, float32 [T, R].

  The gradients are products in `dtype` with float32 accumulation as well:
  JAX's own rule would mix float32 cotangents with bfloat16 weights, which
  falls off the fast path on every backend.
  """
  return _dot(x.astype(dtype), weight.astype(dtype), 1, 1)


def _rows_product_forward(x, weight, dtype):
  x_cast, w_cast = x.astype(dtype), weight.astype(dtype)
  # Empty arrays remember the dtypes of the inputs for the cotangents.
  like = jnp.zeros((0,), x.dtype), jnp.zeros((0,), weight.dtype)
  return _dot(x_cast, w_cast, 1, 1), (x_cast, w_cast, like)


def _rows_product_backward(dtype, saved, g):
  x, w, (like_x, like_w) = saved
  g = g.astype(dtype)
  dx = _dot(g, w, 1, 0)
  # CPU kernels run a product whose left operand is contracted over its
  # leading axis three times slower (285 against 800 GFLOP/s at [1024, 640] x
  # [1024, 2048] in bfloat16): hand them a transposed copy.
  g_t = lax.optimization_barrier(g.T)
  dw = _dot(g_t, x, 1, 0)
  return dx.astype(like_x.dtype), dw.astype(like_w.dtype)


_rows_product.defvjp(_rows_product_forward, _rows_product_backward)


def _dot(x, y, axis_x, axis_y):
  return lax.dot_general(
      x, y, (((axis_x,), (axis_y,)), ((), ())),
      preferred_element_type=jnp.float32,
  )


def gram(x, contraction):
  """Sums outer products of the inputs of a matrix over all tokens.

  Args:
    x: [..., inputs...].
    contraction: number of input axes.

  Returns:
    float32 [C, C], C the product of the input axes.
  """
  length = math.prod(x.shape[x.ndim - contraction :])
  rows = x.reshape(-1, length).astype(jnp.float32)
  return rows.T @ rows


def rms_norm(x, gain, epsilon):
  """Normalises the last axis to root mean square 1, times (1 + gain).

  Computed in float32; returned in the dtype of x. x [..., D], gain [D].
  """
  y = x.astype(jnp.float32)
  y *= lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
  gain = 1.0 + gain.astype(jnp.float32)
  return (y * jnp.reshape(gain, (1,) * (y.ndim - 1) + gain.shape)).astype(
      x.dtype
  )


def rope(x, positions, base, scaling):
  """Rotates the two halves of each head by angles that grow with position.

  Args:
    x: [B, L, N, H].
    positions: int [B, L].
    base: wavelengths run from 2 pi to 2 pi `base`.
    scaling: positions are divided by this.

  Returns:
    [B, L, N, H] in the dtype of x; the angles are float32.
  """
  half = x.shape[-1] // 2
  frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = (positions.astype(jnp.float32) / scaling)[..., None, None]
  angle = angle * frequency.reshape(1, 1, 1, half)
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


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


def attention(q, k, v, window, dtype, implementation):
  """Causal attention of a whole sequence, grouped-query heads.

  Args:
    q: [B, L, N, H], already scaled.
    k: [B, L, K, H].
    v: [B, L, K, H].
    window: see `visible`; static, so that a flash kernel can skip blocks.
    dtype: of the operands of the two products.
    implementation: 'mapped' (one key/value head after the other, as plain
      matrix products: on a CPU 4 times faster, backward included, than the
      batched products of 'xla' in bfloat16), or one that
      `jax.nn.dot_product_attention` knows ('xla', 'cudnn').

  Returns:
    float32 [B, L, N, H].
  """
  if implementation == 'mapped':
    return _mapped_attention(q, k, v, window, dtype)
  out = jax.nn.dot_product_attention(
      q.astype(dtype), k.astype(dtype), v.astype(dtype),
      scale=1.0,
      is_causal=True,
      local_window_size=None if window is None else (window - 1, 0),
      implementation=implementation,
  )
  return out.astype(jnp.float32)


def _mapped_attention(q, k, v, window, dtype):
  b, l, n, h = q.shape
  heads = k.shape[2]
  positions = jnp.arange(l)[None]
  mask = visible(positions, positions, window)[0]

  def one_head(qkv):
    q, k, v = qkv  # [N / K, L, H], [L, H], [L, H]
    scores = contract(q, k, 1, dtype)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    return contract(weights, v.T, 1, dtype)

  q = q.reshape(b, l, heads, n // heads, h).transpose(0, 2, 3, 1, 4)
  q = q.reshape(b * heads, n // heads, l, h)
  flat = lambda x: x.transpose(0, 2, 1, 3).reshape(b * heads, l, h)
  out = lax.map(one_head, (q, flat(k), flat(v)))
  out = out.reshape(b, heads, n // heads, l, h).transpose(0, 3, 1, 2, 4)
  return out.reshape(b, l, n, h)


def cached_attention(q, k, v, mask, dtype):
  """Attention over a key/value cache with an explicit mask.

  Shapes as in `attention`, with k, v [B, S, K, H] and mask [B, 1, L, S].
  """
  out = jax.nn.dot_product_attention(
      q.astype(dtype), k.astype(dtype), v.astype(dtype), mask=mask, scale=1.0
  )
  return out.astype(jnp.float32)


def gelu(x):
  """GELU by its tanh approximation, as Gemma was trained with."""
  return jax.nn.gelu(x, approximate=True)
