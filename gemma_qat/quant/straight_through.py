"""How does a gradient get through rounding to a number format?

The functions take a `formats.Format` as first argument; call them through its
methods. custom_vjp and not w + stop_gradient(q - w): that sum is rounded, and
the forward value would not be the one in the file.
"""

import functools

import jax
import jax.numpy as jnp

from gemma_qat.quant import rounding


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def fake_quantize(format, contraction, is_clipped, weight):
  """dequantize(quantize(weight)) with the identity as gradient.

  Clipped: 0 where the weight lies outside of what codes can say.
  """
  del is_clipped
  return format.dequantize(format.quantize(weight, contraction))


def _fake_quantize_forward(format, contraction, is_clipped, weight):
  value = fake_quantize(format, contraction, is_clipped, weight)
  return value, weight if is_clipped else None


def _fake_quantize_backward(format, contraction, is_clipped, weight, gradient):
  if not is_clipped:
    return (gradient,)
  codes, scale = format.quantize(weight, contraction)
  d = spread(format, format.stored_scale(scale), weight)
  lost = jnp.abs(weight - d * (codes.astype(jnp.float32) - format.zero))
  # A little more than half a step: the scale was rounded after the codes.
  inside = (lost <= 0.501 * jnp.abs(d)) | (d == 0)
  return (jnp.where(inside, gradient, 0.0),)


fake_quantize.defvjp(_fake_quantize_forward, _fake_quantize_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fake_quantize_learned(format, is_clipped, master, scale):
  """The nearest point of a given scale's lattice; see `Format` for gradients.
  """
  del is_clipped
  d = spread(format, format.stored_scale(scale), master)
  codes, _ = nearest(format, master, scale)
  return d * (codes.astype(jnp.float32) - format.zero)


def _learned_forward(format, is_clipped, master, scale):
  # Master and scale alone are kept: codes are cheaper to recompute than to
  # hold for every layer until the backward pass.
  value = fake_quantize_learned(format, is_clipped, master, scale)
  return value, (master, scale)


def _learned_backward(format, is_clipped, residuals, gradient):
  master, scale = residuals
  codes, ratio = nearest(format, master, scale)
  level = codes.astype(jnp.float32) - format.zero
  inside = level == jnp.round(ratio)
  to_scale = gradient * jnp.where(inside, level - ratio, level)
  to_master = jnp.where(inside, gradient, 0.0) if is_clipped else gradient
  return to_master, _gather(format, to_scale, scale)


fake_quantize_learned.defvjp(_learned_forward, _learned_backward)


def nearest(format, master, scale):
  """Returns the int8 codes nearest to master / scale, and that ratio.

  Where float16 stores the scale as 0 the ratio counts as 0. Multiplied by the
  scale's inverse, one a block, it is the same on every machine: one may train
  and another write the file. An exact division of every weight would take a
  hundred operations on a GPU.
  """
  d = format.stored_scale(scale)
  inverse = rounding.divide(jnp.ones_like(d), d)
  ratio = master * spread(format, inverse, master)
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
