"""Is this array, bit for bit, the one that was saved?

Every bit pattern and its place are mixed to 32 bits, these are added up modulo
2^32, twice: one changed number always changes the sums, several do but for one
time in 2^64. Integers add up to the same in any order, so that the sums of an
array are the same on every mesh: each process adds up what it holds.

By numpy, on all cores: a program would have to be compiled for every shape, and
on several processes exchange something for every array.
"""

from collections.abc import Iterator, Mapping
import concurrent.futures

import jax
from jax.experimental import multihost_utils
import numpy as np

# Numbers at a time: their mixtures stay in the cache.
_PIECE = 2**17


def of(array: np.ndarray) -> str:
  """Returns 16 hexadecimal digits; shape and type are not in them.

  Args:
    array: of numbers of 1, 2 or 4 bytes.
  """
  return of_all({'': array})['']


def of_all(
    arrays: 'Mapping[str, jax.Array | np.ndarray]',
) -> dict[str, str]:
  """`of` each array by its name; those on devices are read where they lie.

  Where some lie on several processes all of these call it, with the same names
  in the same order; of arrays of its own one may ask alone.
  """
  with concurrent.futures.ThreadPoolExecutor() as pool:
    futures = {
        name: [pool.submit(_sums, *piece) for piece in _pieces(x)]
        for name, x in arrays.items()
    }
    found = np.zeros((len(arrays), 2), np.uint32)
    for row, name in zip(found, futures):
      for future in futures[name]:
        row += future.result()
  is_shared = np.array([
      isinstance(x, jax.Array) and not x.is_fully_addressable
      for x in arrays.values()
  ], bool)
  if is_shared.any():
    # What every process has whole counts once.
    parts = multihost_utils.process_allgather(found[is_shared])
    found[is_shared] = np.sum(parts, axis=0, dtype=np.uint32)
  return {
      name: f'{one:08x}{two:08x}'
      for name, (one, two) in zip(arrays, found.tolist())
  }


def _pieces(array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Cuts what this process holds into (numbers, their places), both flat."""
  shape = array.shape
  if isinstance(array, jax.Array):
    # A copy of a part counts on one device alone.
    held = [
        (s.index, np.asarray(s.data)) for s in array.addressable_shards
        if s.replica_id == 0
    ]
    if array.is_fully_replicated:
      held = [((), np.asarray(array.addressable_data(0)))]
      if not array.is_fully_addressable and jax.process_index():
        held = []
  else:
    held = [((), np.asarray(array))]
  for index, part in held:
    starts = [i.start or 0 for i in index] or [0] * len(shape)
    if part.shape == shape:
      flat = part.reshape(-1)
      for at in range(0, flat.size, _PIECE):
        piece = flat[at : at + _PIECE]
        # Places count modulo 2^32, as everything here.
        place = np.arange(at, at + piece.size, dtype=np.uint64)
        yield piece, place.astype(np.uint32)
      continue
    place = np.zeros((), np.uint64)
    for size, start, whole in zip(part.shape, starts, shape, strict=True):
      along = np.arange(start, start + size, dtype=np.uint64)
      place = place[..., None] * np.uint64(whole) + along
    place = place.astype(np.uint32).reshape(-1)
    flat = part.reshape(-1)
    for at in range(0, flat.size, _PIECE):
      yield flat[at : at + _PIECE], place[at : at + _PIECE]


def _sums(numbers, place):
  raw = np.ascontiguousarray(numbers).view(f'u{numbers.dtype.itemsize}')
  one = _mixed(raw.astype(np.uint32) + place * np.uint32(0x9E3779B1))
  two = _mixed(one ^ place)
  return np.array([x.sum(dtype=np.uint32) for x in (one, two)], np.uint32)


def _mixed(h):
  """A permutation of 32 bits in which every bit depends on every other.

  Source: Wellons, 'Prospecting for Hash Functions', lowbias32.
  """
  h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
  h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
  return h ^ (h >> np.uint32(16))
