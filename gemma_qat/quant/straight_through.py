"""How does a gradient get through rounding to a number format?

The functions take a `formats.Format` as first argument; call them through its
methods. custom_vjp and not w + stop_gradient(q - w): that sum is rounded, and
the forward value would not be the one in the file.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fake_quantize(format, contraction, weight):
  """dequantize(quantize(weight)) with the identity as gradient."""
  return format.dequantize(format.quantize(weight, contraction))


def _fake_quantize_forward(format, contraction, weight):
  return fake_quantize(format, contraction, weight), None


def _fake_quantize_backward(format, contraction, _, gradient):
  del format, contraction
  return (gradient,)


fake_quantize.defvjp(_fake_quantize_forward, _fake_quantize_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fake_quantize_learned(format, master, scale):
  """The nearest point of a given scale's lattice; see `Format` for gradients.
  """
  d = spread(format, format.stored_scale(scale), master)
  codes, _ = nearest(format, master, scale)
  return d * (codes.astype(jnp.float32) - format.zero)


def _learned_forward(format, master, scale):
  # Master and scale alone are kept: codes are cheaper to recompute than to
  # hold for every layer until the backward pass.
  return fake_quantize_learned(format, master, scale), (master, scale)


def _learned_backward(format, residuals, gradient):
  master, scale = residuals
  codes, ratio = nearest(format, master, scale)
  level = codes.astype(jnp.float32) - format.zero
  inside = level == jnp.round(ratio)
  to_scale = gradient * jnp.where(inside, level - ratio, level)
  return jnp.where(inside, gradient, 0.0), _gather(format, to_scale, scale)


fake_quantize_learned.defvjp(_learned_forward, _learned_backward)


def nearest(format, master, scale):
  """Returns the int8 codes nearest to master / scale, and that ratio.

  Where float16 stores the scale as 0 the ratio counts as 0.
  """
  d = spread(format, format.stored_scale(scale), master)
  ratio = jnp.where(d == 0, 0.0, master / jnp.where(d == 0, 1.0, d))
  codes = jnp.round(ratio) + format.zero
  codes = jnp.clip(codes, format.lowest, format.highest)
  return codes.astype(jnp.int8), ratio


def spread(format, scale, weight):
  """Repeats each scale for the weights that share it: the weight's shape."""
  if format.block is not None:
    scale = jnp.repeat(scale, format.block, axis=-1)
  return jnp.broadcast_to(scale, weight.shape)


def _gather(format, x, scale):
  """Sums over the weights that share a scale: the adjoint of `spread`."""
  if format.block is not None:
    return x.reshape(*scale.shape, format.block).sum(-1)
  axes = tuple(i for i, n in enumerate(scale.shape) if n != x.shape[i])
  return x.sum(axes, keepdims=True)
