"""How do the parts of a weight come together where they are multiplied?

Under 'fsdp' every device holds a part of each weight and needs the whole of it
for one layer at a time. What travels is the choice here:
  weights: what the product takes, in its dtype: 16 bits a weight.
  codes: the student's codes and scales, 4.5 bits a weight of Q4_0. Exact, for
    the forward pass sees nothing else.
On the way back the gradient is summed over the devices and parted again, as
ever.
"""

from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp

from gemma_qat import sharding
from gemma_qat.model import config as model_config
from gemma_qat.model import weights
from gemma_qat.quant import formats
from gemma_qat.quant import lattice
from gemma_qat.quant import rounding

CHOICES = ('weights', 'codes')
# The axis that is whole where a weight is used.
_PARTED = 'embed'


def make_gather(
    intercept: Callable[[str, Any], jax.Array],
    plan: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    config: model_config.ModelConfig,
    choice: str,
    dtype: Any,
) -> Callable[[str, Any], jax.Array]:
  """Returns an intercept that also says what is gathered, and when.

  Args:
    intercept: what a weight becomes, computed on its parts.
    plan: path -> `lattice.Entry`; empty for a teacher.
    mesh: from `sharding.make_mesh`.
    config: the sizes.
    choice: one of `CHOICES`.
    dtype: of the operands of products.
  """
  if mesh.shape['fsdp'] == 1:
    return intercept
  specs = weights.layer_specs(config)
  plan = {path: lattice.Entry(*entry) for path, entry in plan.items()}

  def gathered(path, node):
    # The embedding comes in rows; the loss gathers the head in blocks.
    spec = specs.get(path.rpartition('/')[2])
    if spec is None or not spec.contraction:
      return intercept(path, node)
    entry = plan.get(path)
    travels = choice == 'codes' and entry and entry.mode != 'fixed'
    parts = lambda x, whole: _constrain(mesh, x, spec.axes, whole)

    def forward(node):
      if not travels:
        weight = parts(intercept(path, node).astype(dtype), False)
        # The product casts it again, which costs nothing; its gradient is
        # float32, summed over the devices as such.
        return parts(weight, True).astype(jnp.float32)
      quantized = lattice.quantized(node, *entry)
      quantized = _unpack(
          entry.format, *(parts(x, True) for x in _pack(entry.format, quantized))
      )
      return entry.format.dequantize(quantized)

    @jax.custom_vjp
    def run(node):
      return forward(node)

    def backward(node, gradient):
      _, pull_back = jax.vjp(lambda node: intercept(path, node), node)
      like = jax.eval_shape(lambda node: intercept(path, node), node)
      return pull_back(parts(gradient, False).astype(like.dtype))

    run.defvjp(lambda node: (forward(node), node), backward)
    return run(node)

  return gathered


def _constrain(mesh, x, axes, whole):
  """Says that an array is whole along the parted axis, or is not.

  An axis of one element, as of the scale of a row, is whole anyway.
  """
  axes = tuple(
      None if n == 1 or (whole and a == _PARTED) else a
      for a, n in zip(axes, x.shape)
  )
  return jax.lax.with_sharding_constraint(x, sharding.named(mesh, axes))


def _pack(format, quantized):
  """Codes and scales in as few bytes as they need.

  Of block formats one array, the blocks as a file has them: the two bytes of
  the scale, then the codes. Nibbles are those of the first and the second half
  of the block, so that a part of whole blocks packs to a part of the bytes.
  """
  codes = (quantized.codes - format.lowest).astype(jnp.uint8)
  if format.block is None:
    return codes, quantized.scale
  codes = format.blocks(codes)
  if _fits_nibbles(format):
    low, high = jnp.split(codes, 2, axis=-1)
    codes = low | (high << 4)
  # As bytes: 16-bit numbers may travel as the 32-bit ones they came from.
  scale = rounding.float16_bits(quantized.scale)[..., None]
  scale = [(scale & 255).astype(jnp.uint8), (scale >> 8).astype(jnp.uint8)]
  packed = jnp.concatenate([*scale, codes], axis=-1)
  return (packed.reshape(*packed.shape[:-2], -1),)


def _unpack(format, packed, scale=None):
  if format.block is None:
    return _quantized(format, packed, scale)
  is_half = _fits_nibbles(format)
  size = 2 + format.block // (2 if is_half else 1)
  blocks = packed.reshape(*packed.shape[:-1], -1, size)
  low, high = (blocks[..., i].astype(jnp.uint16) for i in (0, 1))
  codes = blocks[..., 2:]
  if is_half:
    codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)
  scale = rounding.from_float16_bits(low | (high << 8))
  return _quantized(format, codes.reshape(*codes.shape[:-2], -1), scale)


def _quantized(format, codes, scale):
  codes = (codes.astype(jnp.int16) + format.lowest).astype(jnp.int8)
  return formats.Quantized(codes, scale)


def _fits_nibbles(format):
  return format.block is not None and format.highest - format.lowest == 15
