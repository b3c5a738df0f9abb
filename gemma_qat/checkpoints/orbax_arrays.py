"""How are the arrays of an Orbax folder read a slice at a time?

Orbax restores whole trees. Which arrays there are and how they are stored
comes from the JSON that it leaves (`_METADATA`), shapes and rows from
tensorstore, which Orbax itself stores with: in OCDBT ('manifest.ocdbt') or, as
old Orbax did, in one zarr folder per array. Nothing in a folder is believed
before it is compared, and nothing is executed.
"""

from collections.abc import Callable, Mapping
import functools
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from gemma_qat import errors
from gemma_qat.checkpoints import regular_files

METADATA = '_METADATA'
_OCDBT = 'manifest.ocdbt'
# 27B has 0.2 MB of it.
_LARGEST_METADATA = 2**26
# The largest real array is the float32 embedding of 27B: 5.6 GB.
_LARGEST_ARRAY = 2**36
# Weights are noise, which zstd makes a fifth smaller. What claims to be larger
# than this many bytes, and a hundred times as large as its files, is made up.
_UNSUSPICIOUS, _MOST_FOR_A_BYTE = 2**28, 100
# Chunks above are kept decoded while pieces of them are read.
_LARGE_CHUNK = 2**20
_ARRAYS = ('jax.Array', 'np.ndarray', 'scalar')
_DTYPES = (
    'float32', 'float16', 'bfloat16', 'float64', 'bool',
    'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64',
)
# All that tensorstore raises, whatever went wrong in a file.
_FAILURES = (ValueError, KeyError, IndexError, OSError, OverflowError,
             RuntimeError, NotImplementedError)

# An index of leading axes: numbers and slices.
Index = tuple[int | slice, ...]


class LazyArray(NamedTuple):
  """An array of a folder, of which nothing but shape and dtype was read.

  read: takes an `Index` and returns that part, having read no chunk that does
  not touch it; raises UserError if one is missing or damaged.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[Index], np.ndarray]

  @property
  def itemsize(self) -> int:
    return self.dtype.itemsize


def is_tree(folder: str | os.PathLike) -> bool:
  """Whether Orbax stored a tree of arrays in this very folder."""
  return pathlib.Path(folder, METADATA).is_file()


def read_metadata(folder: pathlib.Path) -> bytes:
  """Returns what Orbax says of the tree in a folder, unparsed.

  Raises:
    UserError: it is missing or larger than any can be.
  """
  return regular_files.read_bytes(folder / METADATA, _LARGEST_METADATA)


def open_tree(folder: str | os.PathLike) -> dict[str, LazyArray]:
  """Opens every array of a folder: 'a/b/c' -> `LazyArray`.

  Keys of nested dicts are joined with '/'; a key may hold some already.

  A missing chunk would read as zeros. Orbax says whether it stored the chunks
  that are all zero; where it did, they are counted before the first read of an
  array. In OCDBT a lost data file is noticed whether it did or not.

  Raises:
    UserError: no tree there, metadata that is damaged or announces arrays or
      chunks of impossible sizes, or names that lead out of the folder.
  """
  folder = pathlib.Path(folder).resolve()
  # Tensorstore opens whatever lies where its metadata leads.
  regular_files.check_tree(folder)
  said = _read_metadata(folder)
  is_whole = said.get('store_array_data_equal_to_fill_value') is True
  specs = _specs(folder, said)
  context = ts.Context()
  opening = {
      name: _open(folder, name, spec, context) for name, spec in specs.items()
  }
  stores = {
      name: _result(folder, name, future) for name, future in opening.items()
  }
  # One large chunk at a time is kept, that of the array being read.
  kept = functools.lru_cache(maxsize=1)(
      lambda name, size: _result(folder, name, _open(
          folder, name, specs[name],
          ts.Context({'cache_pool': {'total_bytes_limit': size}}),
      ))
  )
  found = {}
  for name, store in stores.items():
    _check_sizes(folder, name, store)
    _check_codec(folder, name, store)
    read = functools.partial(
        _read, folder, name, store, kept, functools.cache(functools.partial(
            _check_chunks, folder, name, store, is_whole
        ))
    )
    found[name] = LazyArray(
        tuple(store.shape), np.dtype(store.dtype.numpy_dtype), read
    )
  return found


def spec(
    folder: pathlib.Path,
    name: str,
    is_ocdbt: bool = True,
    is_zarr3: bool = False,
) -> dict[str, Any]:
  """Says to tensorstore where Orbax keeps an array.

  Args:
    folder: of the tree, absolute.
    name: the keys of its path joined with '.'.
    is_ocdbt, is_zarr3: how the tree is stored.
  """
  if is_ocdbt:
    base = {'driver': 'file', 'path': f'{folder}/'}
    kvstore = {'driver': 'ocdbt', 'base': base, 'path': f'{name}/'}
  else:
    kvstore = {'driver': 'file', 'path': f'{folder}/{name}/'}
  return {'driver': 'zarr3' if is_zarr3 else 'zarr', 'kvstore': kvstore}


def check_density(
    folder: pathlib.Path, arrays: Mapping[str, LazyArray]
) -> None:
  """Refuses small files that would fill the memory with zeros.

  Not for an optimizer's state, which may be all zeros.

  Raises:
    UserError: the arrays of a folder are far larger than weights in its files
      can be.
  """
  claimed = sum(math.prod(a.shape) * a.itemsize for a in arrays.values())
  stored = sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())
  if claimed > max(_UNSUSPICIOUS, _MOST_FOR_A_BYTE * stored):
    raise errors.UserError(
        f'{folder} claims {claimed:,} bytes of arrays in {stored:,} bytes of '
        'files, which no checkpoint does: it is not to be trusted.'
    )


def _read_metadata(folder):
  try:
    said = json.loads(read_metadata(folder))
    if not isinstance(said['tree_metadata'], dict):
      raise ValueError('tree_metadata')
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise errors.UserError(
        f'{folder} has no {METADATA} of Orbax that can be read '
        f'({error!r:.100}): fetch it again.'
    ) from error
  return said


def _specs(folder, said: Mapping[str, Any]):
  """Returns {'a/b/c': spec} of all arrays that the metadata names."""
  is_ocdbt = (folder / _OCDBT).is_file()
  specs = {}
  for entry in said['tree_metadata'].values():
    try:
      keys = [str(part['key']) for part in entry['key_metadata']]
      value = entry['value_metadata']
      is_array = (
          value['value_type'] in _ARRAYS and not value.get('skip_deserialize')
      )
    except (KeyError, TypeError, AttributeError) as error:
      raise errors.UserError(
          f'{folder / METADATA} is damaged ({error!r:.100}): fetch it again.'
      ) from error
    name = '/'.join(keys)
    if {'', '.', '..'} & set('.'.join(keys).split('/')) or '\0' in name:
      raise errors.UserError(
          f'{folder / METADATA} names an array {name!r:.100}, which leads out '
          'of the folder: it is not to be trusted.'
      )
    if is_array:
      specs[name] = spec(
          folder, '.'.join(keys), is_ocdbt, said.get('use_zarr3') is True
      )
  return specs


def _open(folder, name, array_spec, context):
  try:
    return ts.open(array_spec, read=True, open=True, context=context)
  except _FAILURES as error:
    raise _damaged(folder, name, error) from error


def _result(folder, name, future):
  try:
    return future.result()
  except _FAILURES as error:
    raise _damaged(folder, name, error) from error


def _check_sizes(folder, name, store):
  """Refuses what would have to be allocated to be found wrong."""
  if store.dtype.name not in _DTYPES:
    raise errors.UserError(
        f'{folder}: {name} has type {store.dtype.name}, which no weight has: '
        'it is not to be trusted.'
    )
  size = math.prod(store.shape) * store.dtype.numpy_dtype.itemsize
  for chunk in _chunks(store):
    if size > _LARGEST_ARRAY or any(
        c > max(1, s) for c, s in zip(chunk, store.shape, strict=True)
    ):
      raise errors.UserError(
          f'{folder}: {name} claims the shape {tuple(store.shape)} in chunks '
          f'of {tuple(chunk)}, which no checkpoint has: it is not to be '
          'trusted.'
      )


def _check_codec(folder, name, store):
  """Refuses the one codec that allocates whatever a chunk claims to hold.

  The others give up where the chunk that was announced is full; 8 MB of blosc
  took 2 GB, and ended the process where there were none. Orbax writes zstd,
  and wrote gzip.
  """
  # Not by `to_json`, of which tensorstore loses 4 kB at every call.
  if 'blosc' in repr(store.codec):
    raise errors.UserError(
        f'{folder}: {name} is compressed by blosc, which Orbax does not use: '
        'it is not to be trusted.'
    )


def _chunks(store):
  """Shapes of what is read at once and written at once; none of a scalar."""
  layout = store.chunk_layout
  return layout.read_chunk.shape or (), layout.write_chunk.shape or ()


def _check_chunks(folder, name, store, is_whole):
  """Counts the chunks of an array if all of them have to be there."""
  if not is_whole:
    return
  _, chunk = _chunks(store)
  expected = math.prod(-(-s // c) for s, c in zip(store.shape, chunk))
  try:
    keys = store.kvstore.list().result()
  except _FAILURES as error:
    raise _damaged(folder, name, error) from error
  chunks = [k for k in keys if k not in (b'.zarray', b'.zattrs', b'zarr.json')]
  if len(chunks) < expected:
    raise errors.UserError(
        f'{folder} is damaged, {expected - len(chunks)} of {expected} chunks '
        f'of {name} are missing: fetch it again.'
    )


def _read(folder, name, store, kept, check_chunks, index):
  check_chunks()
  chunk, _ = _chunks(store)
  size = math.prod(chunk) * store.dtype.numpy_dtype.itemsize
  if size > _LARGE_CHUNK:
    store = kept(name, size + _LARGE_CHUNK)
  try:
    return np.asarray(store[index].read().result())
  except _FAILURES as error:
    raise _damaged(folder, name, error) from error


def _damaged(folder, name, error):
  reason = str(error).strip().split('\n')[0][:200]
  return errors.UserError(
      f'{folder} is damaged, {name} cannot be read ({reason}): fetch it again.'
  )
