"""A sum says whether an array is what it was, wherever it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import sharding
from gemma_qat.checkpoints import sums

DTYPES = ('float32', 'bfloat16', 'float16', 'int8', 'uint8', 'int32')


def _array(dtype, shape=(8, 3, 16)):
  raw = np.random.default_rng(0).integers(
      0, 256, (*shape, jnp.dtype(dtype).itemsize), np.uint8
  )
  return raw.view(jnp.dtype(dtype))[..., 0]


@pytest.mark.parametrize('dtype', DTYPES)
def test_every_flipped_bit_changes_it(dtype):
  array = _array(dtype, (2, 5))
  seen = {sums.of(array)}
  raw = array.view(np.uint8)
  for i in np.ndindex(raw.shape):
    for bit in range(8):
      raw[i] ^= 1 << bit
      seen.add(sums.of(array))
      raw[i] ^= 1 << bit
  assert len(seen) == 1 + 8 * raw.size


def test_two_flipped_signs_do_not_cancel():
  array = _array('float32')
  other = array.copy()
  other[0, 0, 3] *= -1
  other[5, 1, 2] *= -1
  assert sums.of(array) != sums.of(other)


def test_two_entries_in_each_others_place_change_it():
  array = _array('float32')
  other = array.copy()
  other[0, 0, 3], other[5, 1, 2] = array[5, 1, 2], array[0, 0, 3]
  assert sums.of(array) != sums.of(other)


@pytest.mark.parametrize('dtype', DTYPES)
def test_it_is_the_same_on_every_mesh(dtype):
  array = _array(dtype)
  mesh = sharding.make_mesh(2, 2, 2)
  spread = jax.device_put(array, jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec('fsdp', None, 'tensor')
  ))
  every = jax.device_put(array, sharding.replicated(mesh))
  found = sums.of_all({
      'spread': spread, 'host': array, 'one': jnp.asarray(array), 'every': every
  })
  assert set(found.values()) == {sums.of(array)} and len(found) == 4


def test_pieces_of_a_large_array_are_those_of_the_whole():
  array = _array('int8', (3, 2**17 + 5))
  mesh = sharding.make_mesh(8, 1, 1)
  spread = jax.device_put(array.T.copy()[: 2**17], jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec('data', None)
  ))
  whole = array.T.copy()[: 2**17]
  assert sums.of_all({'': spread})[''] == sums.of(whole)
  whole[-1, -1] ^= 1
  assert sums.of_all({'': spread})[''] != sums.of(whole)


def test_a_scalar_and_nothing_have_one_as_well():
  assert sums.of(np.float32(1)) != sums.of(np.float32(2))
  assert sums.of(np.zeros((0, 4), np.float32)) == '0' * 16
