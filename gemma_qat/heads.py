"""How is the head of a loss shared among devices, and what of it is trained?

A head is [V, D], or a tree of arrays [V, ...] that stand for one (codes and
scales). Mesh axes part its rows, its columns and the tokens.
"""

from typing import Any, Callable, NamedTuple, Sequence

import jax
from jax import lax
import jax.numpy as jnp

P = jax.sharding.PartitionSpec


class Placement(NamedTuple):
  """How the operands of `linear_kl` are cut over a mesh.

  Attributes:
    mesh: the devices.
    tokens: mesh axes that part the tokens among them.
    vocabulary: mesh axis that parts the rows of the heads.
    width: mesh axis that parts their columns; gathered block by block.
  """

  mesh: jax.sharding.Mesh
  tokens: tuple[str, ...]
  vocabulary: str
  width: str


def is_float(tree: Any) -> list[bool]:
  """Of each leaf: whether it can have a gradient."""
  return [
      jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(tree)
  ]


def floats(tree: Any, chosen: Sequence[bool]) -> list[Any]:
  """The leaves that are chosen, as by `is_float`."""
  return [x for x, f in zip(jax.tree.leaves(tree), chosen) if f]


def with_floats(tree: Any, leaves: Sequence[Any], chosen: Sequence[bool]):
  """The tree with other leaves where they are chosen."""
  old, structure = jax.tree.flatten(tree)
  leaves = iter(leaves)
  return jax.tree.unflatten(
      structure, [next(leaves) if f else x for x, f in zip(old, chosen)]
  )


def on_mesh(
    function: Callable[..., Any],
    placement: Placement | None,
    head: Any,
    out_specs: Callable[[Any], Any],
    more: Callable[[Any], tuple] = lambda tokens: (),
) -> Callable[..., Any]:
  """Lets every device of a mesh do its part; without one, the function.

  Args:
    function: of (student, teacher, head, teacher head, more ...).
    placement: how they lie.
    head: the student's, for its structure.
    out_specs: mesh axes of the tokens -> specs of the results.
    more: mesh axes of the tokens -> specs of further arguments.
  """
  p = placement
  if p is None:
    return function
  tokens = P(p.tokens, None)
  return jax.shard_map(
      function,
      mesh=p.mesh,
      in_specs=(
          tokens, tokens, specs(head, p), P(p.vocabulary, p.width),
          *more(p.tokens),
      ),
      out_specs=out_specs(p.tokens),
      check_vma=False,
  )


def is_cut(head: Any) -> list[bool]:
  """Of each leaf: whether its columns are parted; the scale of a row is one."""
  return [x.shape[-1] > 1 for x in jax.tree.leaves(head)]


def specs(head: Any, placement: Placement) -> Any:
  """How a head lies, from its shapes on any device or all."""
  p = placement
  found = [P(p.vocabulary, p.width if cut else None) for cut in is_cut(head)]
  return jax.tree.unflatten(jax.tree.structure(head), found)


def gather(head: Any, cut: Sequence[bool], placement: Placement | None) -> Any:
  """Gets the other devices' columns of some rows."""
  p = placement
  if p is None or p.mesh.shape[p.width] == 1:
    return head
  leaves, structure = jax.tree.flatten(head)
  return jax.tree.unflatten(structure, [
      lax.all_gather(x, p.width, axis=x.ndim - 1, tiled=True) if c else x
      for x, c in zip(leaves, cut, strict=True)
  ])


def scatter(gradient, cut: bool, placement: Placement | None):
  """Sums over the tokens of all devices, to the columns that are held here."""
  p = placement
  if p is None:
    return gradient
  if not cut:
    return lax.psum(gradient, p.tokens)
  rest = tuple(a for a in p.tokens if a != p.width)
  return lax.psum(
      lax.psum_scatter(
          gradient, p.width, scatter_dimension=gradient.ndim - 1, tiled=True
      ),
      rest,
  )
