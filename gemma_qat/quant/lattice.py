"""What does a student hold in place of a weight, and which numbers is that?

A node is what stands in the tree at a weight's path. Its mode says what is
trained:
  derived: a plain array, the master; its scale follows from it at every step.
  learned: {'master', 'scale'}; codes follow from both (LSQ).
  codes: {'codes', 'scale'}; codes stand still, scales are trained.
  fixed: a plain array of values on the lattice already, used as they are.
  loraN: learned, and factors of rank N that are added to the master; see
    `low_rank`.
Training, evaluation and export all get their numbers from `quantized`.
"""

from typing import Any, Callable, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat import errors
from gemma_qat.quant import formats
from gemma_qat.quant import low_rank

MODES = ('derived', 'learned', 'codes', 'fixed')
STRAIGHT_THROUGH = ('plain', 'clipped')


class Entry(NamedTuple):
  """What a plan says of one weight; contraction as in `formats`."""

  format: formats.Format
  mode: str
  contraction: int


def init_node(
    weight: jax.Array,
    format: formats.Format,
    mode: str,
    contraction: int,
    scale: jax.Array | None = None,
    codes: jax.Array | None = None,
    stacked: bool = False,
    seed: int = 0,
) -> Any:
  """Makes the node of a weight.

  Args:
    weight: float32 [..., last].
    format: the number format.
    mode: one of `MODES`.
    contraction: how many trailing axes the product sums over.
    scale: a starting scale other than the reference rule's; not in the derived
      mode, which has none.
    codes: starting codes, with their scale; in the codes and fixed modes.
    stacked: whether the first axis is one of layers; for loraN.
    seed: of the first factor of loraN.

  Returns:
    An array or a dict of arrays; see the module.

  Raises:
    UserError: unknown mode, or one that the format cannot do.
  """
  check_mode(mode)
  if rank := low_rank.rank(mode):
    factors = low_rank.init_factors(
        weight.shape, contraction, rank, stacked, seed
    )
    node = init_node(weight, format, 'learned', contraction, scale, codes)
    return node | factors
  if codes is not None and scale is None:
    raise ValueError('Codes mean nothing without their scale.')
  if mode == 'derived':
    if scale is not None:
      raise ValueError('A derived node derives its scale: none can be given.')
    return jnp.asarray(weight, jnp.float32)
  if mode == 'learned' and codes is not None:
    raise ValueError('A learned node rounds its master: no codes can be given.')
  start = _start(jnp.asarray(weight, jnp.float32), format, contraction, scale,
                 codes)
  if mode == 'learned':
    format.codes_for(weight, start.scale)  # Raises if there is no such thing.
    return {'master': jnp.asarray(weight, jnp.float32), 'scale': start.scale}
  if mode == 'codes':
    return {'codes': start.codes, 'scale': start.scale}
  return format.dequantize(start)


def quantized(
    node: Any, format: formats.Format, mode: str, contraction: int
) -> formats.Quantized:
  """Returns the codes and scales that the forward pass sees and files get.

  Args:
    node: as made by `init_node`, trained or not.
    format: the number format.
    mode: one of `MODES`.
    contraction: how many trailing axes the product sums over.

  Raises:
    UserError: unknown mode, or a fixed node whose values do not survive
      quantization (not traceable in that mode).
  """
  check_mode(mode)
  if low_rank.rank(mode):
    master = low_rank.master(node, contraction)
    node, mode = {'master': master, 'scale': node['scale']}, 'learned'
  if mode == 'learned':
    codes = format.codes_for(node['master'], node['scale'])
    return formats.Quantized(codes, format.stored_scale(node['scale']))
  if mode == 'codes':
    return formats.Quantized(
        node['codes'], format.stored_scale(node['scale'])
    )
  result = format.quantize(node, contraction)
  if mode == 'fixed':
    # The sign of a zero is not kept; no product can tell.
    wrong = int(np.sum(np.asarray(format.dequantize(result) != node)))
    if wrong:
      raise errors.UserError(
          f'{wrong} of {node.size} fixed weights are not values that '
          f'{format.name} would give them: use the codes mode, which keeps '
          'codes and scales.'
      )
  return result


def make_intercept(
    plan: Mapping[str, tuple[formats.Format, str, int]],
    straight_through: str = 'auto',
) -> Callable[[str, Any], Any]:
  """Returns intercept(path, node) -> the float32 weight the model uses.

  Args:
    plan: path -> `Entry`, or a plain tuple of the same.
    straight_through: one of `STRAIGHT_THROUGH`: whether masters beyond the
      outermost code get gradients; 'auto' is plain in the mode derived, clipped
      in learned.

  Returns:
    A function with no state; paths outside the plan pass through unchanged.
  """
  plan = {path: Entry(*entry) for path, entry in plan.items()}
  for entry in plan.values():
    check_mode(entry.mode)

  def intercept(path, node):
    if path not in plan or plan[path].mode == 'fixed':
      return node
    format, mode, contraction = plan[path]
    if mode == 'derived':
      return format.fake_quantize(
          node, contraction, straight_through == 'clipped'
      )
    if is_learned(mode):
      master = node['master']
      if mode != 'learned':
        master = low_rank.master(node, contraction)
      return format.fake_quantize_learned(
          master, node['scale'], straight_through != 'plain'
      )
    return format.dequantize(formats.Quantized(node['codes'], node['scale']))

  return intercept


def is_learned(mode: str) -> bool:
  """Whether codes follow from a master and a scale of its own."""
  return mode == 'learned' or low_rank.rank(mode) is not None


def parts(mode: str) -> tuple[str, ...]:
  """Names of the arrays of a node; none if it is a plain one."""
  if low_rank.rank(mode):
    return low_rank.PARTS
  return {'codes': ('codes', 'scale'), 'learned': ('master', 'scale')}.get(
      mode, ()
  )


def check_mode(mode: str) -> None:
  """Raises a UserError that lists the modes if this is none of them."""
  if mode not in MODES and not low_rank.rank(mode):
    raise errors.UserError(
        f'Unknown mode {mode!r}: choose one of {", ".join(MODES)}, or loraN '
        'with a rank, as lora16.'
    )


def _start(weight, format, contraction, scale, codes):
  if scale is None:
    return format.quantize(weight, contraction)
  scale = jnp.asarray(scale, jnp.float32)
  if codes is None:
    codes = format.codes_for(weight, scale)
  return formats.Quantized(jnp.asarray(codes, jnp.int8), scale)
