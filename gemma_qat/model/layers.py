"""What does each piece of a Gemma 3 layer compute?

Axis letters, the same in every einsum, docstring and comment of the project:
  B batch, L query positions, S key positions, D width, V vocabulary,
  N query heads, K key/value heads, H head width, F MLP width.

Pure functions of arrays. The residual stream and everything elementwise keep
the dtype they come in; the operands of matrix products are cast to the
product's own dtype and accumulated in float32.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def contract(x, weight, contraction, dtype):
  """Multiplies activations with a matrix stored [outputs..., inputs...].

  The gradients are products in `dtype` with float32 accumulation as well:
  JAX's own rule would mix float32 cotangents with bfloat16 weights, which
  falls off the fast path on every backend.

  Args:
    x: [..., inputs...].
    weight: [outputs..., inputs...].
    contraction: number of input axes.
    dtype: what both operands are cast to.

  Returns:
    float32 [..., outputs...].
  """
  return _contract(x.astype(dtype), weight.astype(dtype), contraction)


def _contract(x, weight, contraction):
  axes_x = tuple(range(x.ndim - contraction, x.ndim))
  axes_w = tuple(range(weight.ndim - contraction, weight.ndim))
  return lax.dot_general(
      x, weight, ((axes_x, axes_w), ((), ())),
      preferred_element_type=jnp.float32,
  )


def _contract_forward(x, weight, contraction, dtype):
  x_cast, w_cast = x.astype(dtype), weight.astype(dtype)
  # Empty arrays remember the dtypes of the inputs for the cotangents.
  like = jnp.zeros((0,), x.dtype), jnp.zeros((0,), weight.dtype)
  return _contract(x_cast, w_cast, contraction), (x_cast, w_cast, like)


def _contract_backward(contraction, dtype, saved, g):
  x, w, (like_x, like_w) = saved
  g = g.astype(dtype)
  outputs = w.ndim - contraction
  batch = x.ndim - contraction
  dx = lax.dot_general(
      g, w,
      ((tuple(range(batch, g.ndim)), tuple(range(outputs))), ((), ())),
      preferred_element_type=jnp.float32,
  )
  # CPU kernels run the product with a left operand that is contracted over
  # its leading axis three times slower (285 against 800 GFLOP/s at
  # [1024, 640] x [1024, 2048] in bfloat16): hand them a transposed copy.
  rows = list(range(batch))
  g_t = jnp.transpose(g, [*range(batch, g.ndim), *rows])
  g_t = lax.optimization_barrier(g_t)
  dw = lax.dot_general(
      g_t, x,
      ((tuple(range(outputs, g_t.ndim)), tuple(rows)), ((), ())),
      preferred_element_type=jnp.float32,
  )
  return dx.astype(like_x.dtype), dw.astype(like_w.dtype)


contract.defvjp(_contract_forward, _contract_backward)


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


def attention(q, k, v, window, dtype):
  """Causal attention of a whole sequence, grouped-query heads.

  Args:
    q: [B, L, N, H], already scaled.
    k: [B, L, K, H].
    v: [B, L, K, H].
    window: see `visible`; static, so that a flash kernel can skip blocks.
    dtype: of the operands of the two products.

  Returns:
    float32 [B, L, N, H].
  """
  out = jax.nn.dot_product_attention(
      q.astype(dtype), k.astype(dtype), v.astype(dtype),
      scale=1.0,
      is_causal=True,
      local_window_size=None if window is None else (window - 1, 0),
  )
  return out.astype(jnp.float32)


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
