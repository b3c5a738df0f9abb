"""Arrays are cut evenly over a mesh, or the mesh is refused."""

import jax
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat import sharding
from gemma_qat.model import config as model_config
from gemma_qat.model import weights


@pytest.mark.parametrize('sizes, expected', [
    ({}, (8, 1, 1)),
    ({'fsdp': 2}, (4, 2, 1)),
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, (2, 2, 2)),
])
def test_data_takes_the_devices_that_the_other_axes_leave(sizes, expected):
  mesh = sharding.make_mesh(**sizes)
  assert mesh.axis_names == sharding.MESH_AXES
  assert mesh.devices.shape == expected


@pytest.mark.parametrize('sizes', [
    {'fsdp': 3}, {'data': 4}, {'data': 2, 'fsdp': 2, 'tensor': 4},
    {'tensor': 16},
])
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes):
  with pytest.raises(errors.UserError, match='there are 8.*config.mesh'):
    sharding.make_mesh(**sizes)


def test_a_mesh_can_be_of_some_devices():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  assert mesh.devices.shape == (1, 1, 1)


def test_logical_axes_are_cut_as_the_table_says():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  spec = weights.by_layer_specs(model_config.variant('tiny'))['layer_0/attn_q']
  placed = jax.device_put(
      np.zeros(spec.shape, np.float32), sharding.named(mesh, spec.axes)
  )
  n, h, d = spec.shape
  assert {s.data.shape for s in placed.addressable_shards} == {
      (n // 2, h, d // 2)
  }
  batch = jax.device_put(
      np.zeros((8, 16)), sharding.named(mesh, ('batch', None))
  )
  assert {s.data.shape for s in batch.addressable_shards} == {(2, 16)}


def test_replicated_arrays_are_whole_on_every_device():
  mesh = sharding.make_mesh()
  placed = jax.device_put(np.zeros((3, 5)), sharding.replicated(mesh))
  assert [s.data.shape for s in placed.addressable_shards] == 8 * [(3, 5)]


@pytest.mark.parametrize('kept, spec', [
    ((6, 4, 256, 64), (None, 'tensor', None, 'fsdp')),  # A moment.
    ((6, 4, 256, 2), (None, 'tensor', None, 'fsdp')),  # Scales of blocks.
    ((6, 4, 256, 3), (None, 'tensor', None, None)),  # They do not split.
    ((6, 4, 256), (None, 'tensor', None)),  # Sums over an axis ...
    ((6, 4, 64), (None, 'tensor', 'fsdp')),  # ... and another.
    ((1,), ()),  # A place holder.
    ((), ()),
], ids=str)
def test_what_is_kept_of_a_parameter_is_cut_like_it(kept, spec):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  parameter = sharding.named(mesh, ('layers', 'heads', 'head_dim', 'embed'))
  found = sharding.of_statistics(parameter, (6, 4, 256, 64), kept)
  assert tuple(found.spec) == spec
  jax.device_put(np.zeros(kept), found)


def test_sums_that_could_be_over_either_axis_of_a_square_stay_whole():
  mesh = sharding.make_mesh(data=4, fsdp=2)
  parameter = sharding.named(mesh, ('mlp', 'embed'))
  found = sharding.of_statistics(parameter, (64, 64), (64,))
  assert tuple(found.spec) == ()


def test_an_axis_that_does_not_divide_is_named_with_sizes_that_work():
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=8)
  with pytest.raises(
      errors.UserError, match=r"layer_0/attn_k: axis 'kv_heads' of 2 .* 8 .*"
      r'tensor among \[1, 2\]',
  ):
    sharding.check(
        mesh, 'layer_0/attn_k', (2, 32, 64), ('kv_heads', 'head_dim', 'embed')
    )


def test_a_mesh_that_would_cut_a_block_is_refused():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  arguments = mesh, 'mlp_up/codes', (128, 64), ('mlp', 'embed')
  # 64 divides by 4, its two blocks of 32 do not.
  sharding.check(*arguments)
  with pytest.raises(
      errors.UserError, match=r"mlp_up/codes: axis 'embed' of 64 .* 4 equal "
      r'blocks of 32.*fsdp among \[1, 2\]',
  ):
    sharding.check(*arguments, block=32)


def test_every_real_size_fits_eight_way_fsdp_with_whole_blocks():
  mesh = sharding.make_mesh(data=1, fsdp=8)
  refused = set()
  for config in model_config.VARIANTS.values():
    for name, spec in weights.layer_specs(config).items():
      try:
        sharding.check(
            mesh, name, spec.shape, spec.axes,
            block=32 if spec.contraction else 1,
        )
      except errors.UserError:
        refused.add(config.variant)
  # Their widths hold 2, 20 and 36 blocks; they are small enough for one device.
  assert refused == {'tiny', '270m', '1b'}


@pytest.mark.parametrize('sizes', [
    {}, {'fsdp': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2},
])
def test_one_process_reads_all_rows(sizes):
  sizes = {'data': 1} | sizes if sizes else sizes
  assert sharding.share(sharding.make_mesh(**sizes), 8) == (0, 1)


def test_activations_are_put_where_the_table_says():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  constrain = sharding.make_constrain(mesh)
  run = jax.jit(lambda x: constrain(x, ('batch', 'length', 'mlp')))
  placed = run(np.zeros((8, 3, 4), np.float32))
  assert {s.data.shape for s in placed.addressable_shards} == {(2, 3, 2)}
