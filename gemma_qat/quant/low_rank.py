"""How does a weight move by a matrix of low rank alone?

A node of the mode 'loraN' is one of 'learned' and two factors of rank N, whose
product is added to the master before it is rounded. What is exported are codes
and scales like any other: nothing of the factors is left to a runtime. Source:
Hu et al., LoRA; as an update before rounding, Dettmers et al., QLoRA and after.
"""

import re
from typing import Any, Mapping

import jax
import jax.numpy as jnp

PARTS = ('master', 'scale', 'lora_a', 'lora_b')


def rank(mode: str) -> int | None:
  """The N of 'loraN'; None for any other mode."""
  found = re.fullmatch(r'lora([1-9]\d{0,3})', mode)
  return int(found[1]) if found else None


def init_factors(
    shape: tuple[int, ...], contraction: int, rank: int, stacked: bool,
    seed: int,
) -> dict[str, jax.Array]:
  """Makes factors whose product is 0.

  Args:
    shape: of the weight, [outputs..., inputs...], stacked layers before them.
    contraction: number of input axes.
    rank: of the product.
    stacked: whether the first axis is one of layers.
    seed: of the first factor.

  Returns:
    lora_a [.., rank, inputs...], normal with variance 1 / inputs; lora_b
    [.., outputs..., rank], zeros.
  """
  layers = shape[:1] if stacked else ()
  inputs = shape[len(shape) - contraction:]
  outputs = shape[len(layers):len(shape) - contraction]
  draw = jax.random.normal(
      jax.random.key(seed), (*layers, rank, *inputs), jnp.float32
  )
  count = 1
  for size in inputs:
    count *= size
  return {
      'lora_a': draw * count**-0.5,
      'lora_b': jnp.zeros((*layers, *outputs, rank), jnp.float32),
  }


def master(node: Mapping[str, Any], contraction: int) -> jax.Array:
  """What is rounded: the master and the product of the factors."""
  product = lambda b, a: jnp.tensordot(b, a, 1)
  if node['lora_a'].ndim == contraction + 2:
    product = jax.vmap(product)
  return node['master'] + product(node['lora_b'], node['lora_a'])


def axes(part: str, weight_axes: tuple[str, ...], contraction: int):
  """Logical axes of a factor, from those of the weight; the rank is 'rank'."""
  layers = weight_axes[:1] if weight_axes[0] == 'layers' else ()
  inputs = weight_axes[len(weight_axes) - contraction:]
  outputs = weight_axes[len(layers):len(weight_axes) - contraction]
  if part == 'lora_a':
    return (*layers, 'rank', *inputs)
  return (*layers, *outputs, 'rank')
