"""Where does each array lie on a mesh of devices?

Weights and batches name their axes logically ('embed', 'mlp', 'batch' ...);
the one table here maps those names to mesh axes. One device is the mesh
1 x 1 x 1.
"""

from typing import Mapping, Sequence

import jax
import numpy as np

from gemma_qat import errors

MESH_AXES = ('data', 'fsdp', 'tensor')

# Logical axis -> mesh axes. Axes that are not named stay whole.
RULES: Mapping[str, str | tuple[str, ...]] = {
    'batch': ('data', 'fsdp'),
    'embed': 'fsdp',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'mlp': 'tensor',
    'vocab': 'tensor',
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None):
  """Arranges the devices in a mesh.

  Args:
    data: copies of the model; -1 takes what the other axes leave over.
    fsdp: parts that weights and batch are split into.
    tensor: parts that heads, MLP and vocabulary are split into.
    devices: all of them by default.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  if data == -1:
    data = max(len(devices) // (fsdp * tensor), 1)
  sizes = (data, fsdp, tensor)
  if np.prod(sizes) != len(devices):
    raise errors.UserError(
        f'A mesh of data={data} x fsdp={fsdp} x tensor={tensor} needs '
        f'{np.prod(sizes)} devices, there are {len(devices)}: change '
        'config.mesh.'
    )
  return jax.make_mesh(
      sizes, MESH_AXES, devices=devices,
      axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )


def partition_spec(axes: Sequence[str | None]) -> jax.sharding.PartitionSpec:
  """Maps logical axis names to a PartitionSpec."""
  return jax.sharding.PartitionSpec(*(RULES.get(a) for a in axes))


def named(mesh, axes: Sequence[str | None]) -> jax.sharding.NamedSharding:
  """Returns the sharding of an array with these logical axes."""
  return jax.sharding.NamedSharding(mesh, partition_spec(axes))


def replicated(mesh) -> jax.sharding.NamedSharding:
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def share(mesh, rows: int) -> tuple[int, int]:
  """Says which part of a batch's rows the devices of this process hold.

  Args:
    mesh: of the devices of all processes.
    rows: of the whole batch.

  Returns:
    (index, count) of the part; processes that hold copies of the same rows
    have the same index.

  Raises:
    UserError: the mesh deals the rows out unevenly.
  """
  where = named(mesh, ('batch', None))
  held = where.addressable_devices_indices_map((rows, 1))
  spans = {index[0].indices(rows)[:2] for index in held.values()}
  start, stop = min(a for a, _ in spans), max(b for _, b in spans)
  size = stop - start
  if sum(b - a for a, b in spans) != size or rows % size or start % size:
    raise errors.UserError(
        f'config.mesh gives this process rows {sorted(spans)} of a batch of '
        f'{rows}, no part that all processes can have alike: let data x fsdp '
        'be a multiple of the number of processes, or divide it.'
    )
  return start // size, rows // size


def make_constrain(mesh):
  """Returns constrain(x, logical axes), which places activations on a mesh."""
  def constrain(x, axes):
    return jax.lax.with_sharding_constraint(x, named(mesh, axes))
  return constrain


def of_statistics(
    parameter: jax.sharding.NamedSharding,
    shape: Sequence[int],
    kept: Sequence[int],
) -> jax.sharding.NamedSharding:
  """Says where an array lies that is kept of each parameter, and cut like it.

  Its axes are the parameter's (moments; scales, whose last axis counts blocks)
  or all of them but one (sums over an axis). An axis that does not split into
  the parameter's parts stays whole, and so does what fits neither way.

  Args:
    parameter: where the parameter lies.
    shape: of the parameter.
    kept: the array's shape.
  """
  mesh, shape, kept = parameter.mesh, tuple(shape), tuple(kept)
  spec = tuple(parameter.spec)
  spec += (None,) * (len(shape) - len(spec))
  without = lambda x, i: x[:i] + x[i + 1 :]
  specs = {spec} if len(kept) == len(shape) else {
      without(spec, i) for i in range(len(shape)) if without(shape, i) == kept
  }
  if len(specs) != 1:
    return replicated(mesh)
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(
      axes if size % _parts(mesh, axes) == 0 else None
      for size, axes in zip(kept, specs.pop())
  )))


def check(
    mesh, name: str, shape: Sequence[int], axes: Sequence[str], block: int = 1
) -> None:
  """Refuses a mesh that would cut an array, or a block of it, unevenly.

  Args:
    mesh: from `make_mesh`.
    name: for the message.
    shape: sizes of the array.
    axes: their logical names.
    block: consecutive elements of the last axis that must stay together.

  Raises:
    UserError: names the weight, the axis and the sizes that work.
  """
  for i, (size, axis) in enumerate(zip(shape, axes)):
    mesh_axes = _names(RULES.get(axis))
    parts = _parts(mesh, mesh_axes)
    unit = block if i == len(shape) - 1 else 1
    if size % (parts * unit):
      whole = size // unit
      works = [n for n in range(1, whole + 1) if whole % n == 0][:8]
      what = f'blocks of {unit}' if unit > 1 else 'parts'
      raise errors.UserError(
          f'{name}: axis {axis!r} of {size} does not split into {parts} equal '
          f'{what}; choose config.mesh {"*".join(mesh_axes)} among {works}.'
      )


def _parts(mesh, mesh_axes):
  """How many parts an axis is cut into by one entry of a PartitionSpec."""
  return int(np.prod([mesh.shape[a] for a in _names(mesh_axes)], dtype=int))


def _names(mesh_axes):
  return (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
