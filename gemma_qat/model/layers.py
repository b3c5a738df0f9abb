"""What does each piece of a Gemma 3 layer compute?

Axis letters, the same in every einsum, docstring and comment of the project:
  B batch, L query positions, S key positions, D width, V vocabulary,
  N query heads, K key/value heads, G query heads a key/value head, H head
  width, F MLP width.

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


def gram(x, contraction, dtype=jnp.float32):
  """Sums outer products of the inputs of a matrix over all tokens.

  Args:
    x: [..., inputs...].
    contraction: number of input axes.
    dtype: of the inputs, as the matrix's own product takes them; sums are
      float32.

  Returns:
    float32 [C, C], C the product of the input axes.
  """
  length = math.prod(x.shape[x.ndim - contraction :])
  rows = x.reshape(-1, length)
  return cross_gram(rows, rows, dtype)


def cross_gram(x, y, dtype=jnp.float32):
  """Sums outer products x y^T over the rows of x [T, C] and y [T, C'].

  Returns:
    float32 [C, C'].
  """
  return _dot(x.astype(dtype), y.astype(dtype), 0, 0)


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


def gelu(x):
  """GELU by its tanh approximation, as Gemma was trained with."""
  return jax.nn.gelu(x, approximate=True)
