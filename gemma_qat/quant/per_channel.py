"""How do the formats with one scale per output channel round a weight?"""

import functools

import jax
import jax.numpy as jnp

from gemma_qat.quant import rounding
from gemma_qat.quant import sfp8 as sfp8_numbers

INT4_MAX = 7


@functools.partial(jax.jit, static_argnames='axes')
def int4(weight: jax.Array, axes: tuple[int, ...]):
  """Quantizes to symmetric int4: codes -7..7, scale absmax / 7.

  -8 is left out so that the lattice is the same for w and -w.

  Args:
    weight: float32, any shape.
    axes: the axes that share a scale.

  Returns:
    Codes int8 of the weight's shape, and scales with `axes` kept as size 1.
  """
  scale = rounding.divide(_absmax(weight, axes), INT4_MAX)
  levels = jnp.round(rounding.divide(weight, scale))
  codes = jnp.clip(levels, -INT4_MAX, INT4_MAX)
  return codes.astype(jnp.int8), scale


@functools.partial(jax.jit, static_argnames='axes')
def sfp8(weight: jax.Array, axes: tuple[int, ...]):
  """Quantizes to gemma.cpp's switched float (SFP8), rescaled to 1.875.

  Args:
    weight: float32, any shape.
    axes: the axes that share a scale.

  Returns:
    The bytes as int8 of the weight's shape, and scales with `axes` kept as
    size 1.
  """
  scale = rounding.divide(_absmax(weight, axes), sfp8_numbers.MAX)
  return sfp8_numbers.encode(rounding.divide(weight, scale)), scale


def _absmax(weight, axes):
  return jnp.max(jnp.abs(weight), axis=axes, keepdims=True)
