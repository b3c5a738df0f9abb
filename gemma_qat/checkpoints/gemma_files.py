"""How does a model come out of, and go into, Google's own checkpoints?

Those are what Kaggle serves for the `gemma` library: a tree of arrays written
by Orbax, `tokenizer.model` beside the folder. Sizes follow from the shapes;
what no shape says (window, RoPE, query scale) from the variant that has them.
"""

from collections.abc import Callable
import functools
import math
import os
import pathlib
import re

import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import atomic
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import gemma_config
from gemma_qat.checkpoints import gemma_names
from gemma_qat.checkpoints import gemma_writer
from gemma_qat.checkpoints import names
from gemma_qat.checkpoints import orbax_arrays
from gemma_qat.checkpoints import padding
from gemma_qat.checkpoints import regular_files
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.model import vision as vision_config
from gemma_qat.model import weights as model_weights

_TOKENIZER = 'tokenizer.model'
_READABLE = ('float32', 'float16', 'bfloat16')
# Where Orbax puts the tree of a folder when not into the folder itself.
_ITEMS = ('default', 'state', 'pytree', 'params')


class _Part(tuple):
  """A lazy array and the index of a weight in its stack, or None."""

  __slots__ = ()

  @property
  def shape(self):
    array, index = self
    return array.shape if index is None else array.shape[1:]

  def read(self, index):
    array, stacked = self
    return array.read(index if stacked is None else (stacked, *index))


def is_folder(path: str | os.PathLike) -> bool:
  """Whether a folder, or the one in it, holds a tree of Google's."""
  tree = _find(pathlib.Path(path))
  # The queries are called so in every form, in one key or two.
  return tree is not None and bool(re.search(
      rb'attn\W+q_einsum', orbax_arrays.read_metadata(tree)
  ))


def load(path: str | os.PathLike) -> checkpoints.Checkpoint:
  """Opens a checkpoint; weights are read when they are asked for.

  Args:
    path: the folder that Orbax wrote, or one that holds only that folder and
      files, as Kaggle's do. `tokenizer.model` is looked for in either, and
      beside.

  Raises:
    UserError: no such folder, not a Gemma 3 of a known size, damaged or
      incomplete.
  """
  path = pathlib.Path(path)
  folder = _find(path)
  if folder is None:
    raise errors.UserError(
        f'{path} holds no {orbax_arrays.METADATA} of Orbax: give the folder '
        "that it lies in, as in Kaggle's gemma-3/flax."
    )
  arrays = orbax_arrays.open_tree(folder)
  orbax_arrays.check_density(folder, arrays)
  found, ignored = _normal(str(folder), arrays)
  shapes = {name: part.shape for name, part in found.items()}
  tokenizer = _tokenizer(path, folder)
  config = gemma_config.read(str(folder), shapes, tokenizer)
  places = gemma_config.turn_gating(gemma_names.places(config), shapes, config)
  specs = model_weights.by_layer_specs(config)
  tower = gemma_config.read_vision(shapes, config.embed_dim)
  tower_specs = vision_config.specs(tower) if tower else {}
  tower_places = gemma_names.vision_places(tower) if tower else {}
  rows, *rest = found[places['embedding'].key].shape
  wanted = gemma_names.file_shapes(specs, places)
  if tower:
    wanted |= gemma_names.file_shapes(
        tower_specs, tower_places, tower.num_heads
    )
  wanted[places['embedding'].key] = (rows, *rest)
  names.check_shapes(str(folder), wanted, shapes)
  metadata = {'dtype': found['final_norm/scale'][0].dtype.name}
  if ignored:
    metadata['ignored_tensors'] = ignored
  return checkpoints.Checkpoint(
      config=config,
      weights=_weights(str(folder), specs, places, found, np.float32),
      tokenizer=padding.cut(tokenizer, config.vocab_size),
      metadata=metadata,
      source=str(path),
      layout='gemma',
      vision=tower and checkpoints.Vision(
          tower, _weights(str(folder), tower_specs, tower_places, found, None)
      ),
  )


def save(
    folder: str | os.PathLike,
    checkpoint: checkpoints.Checkpoint,
    dtype: str = 'bfloat16',
    on_piece: Callable[[str, np.ndarray, np.ndarray], None] | None = None,
) -> None:
  """Writes a folder that the `gemma` library loads, whole or not at all.

  In the flat form of Kaggle's files, piece by piece: the memory it takes does
  not grow with the model. The tower keeps its own dtype. `tokenizer.model`
  lies in the folder, where the library overlooks it.

  Args:
    folder: must not exist, or be empty.
    checkpoint: any; quantized weights are dequantized.
    dtype: of the text model: 'bfloat16' (rounded to nearest) or 'float32'.
    on_piece: called with the by-layer name, the float32 values as written and
      as they were before rounding, for each piece of the text model in order.

  Raises:
    UserError: unknown dtype, NaN in a weight, or the disk refuses.
  """
  if dtype not in gemma_writer.DTYPES:
    raise errors.UserError(
        f'Unknown dtype {dtype!r}: choose one of '
        f'{", ".join(gemma_writer.DTYPES)}.'
    )
  with atomic.whole_folder(folder) as temporary:
    gemma_writer.write(temporary.resolve(), checkpoint, dtype, on_piece)
    if checkpoint.tokenizer is not None:
      (temporary / _TOKENIZER).write_bytes(checkpoint.tokenizer.to_proto())


def _find(path):
  if not path.is_dir():
    return None
  for folder in (path, *(path / item for item in _ITEMS)):
    if orbax_arrays.is_tree(folder):
      return folder
  inner = [p for p in path.iterdir() if orbax_arrays.is_tree(p)]
  return inner[0] if len(inner) == 1 else None


def _normal(source, arrays):
  """Returns {normal name: part} and the keys that are passed over."""
  found, ignored = {}, []
  shapes = {keys: array.shape for keys, array in arrays.items()}
  for name, keys, index in gemma_names.normal_form(shapes):
    if name.startswith(gemma_names.IGNORED):
      ignored.append(keys)
    elif name in found:
      raise errors.UserError(f'{source} holds {name} twice, also as {keys}.')
    else:
      found[name] = _Part((arrays[keys], index))
  return found, sorted(ignored)


def _weights(source, specs, places, found, dtype):
  entries = {}
  for name, spec in specs.items():
    place = places[name]
    array, _ = part = found[place.key]
    if array.dtype.name not in _READABLE:
      raise errors.UserError(
          f'{source}: {place.key} has type {array.dtype.name}; readable are '
          f'{", ".join(_READABLE)}.'
      )
    entries[name] = checkpoints.Entry(
        array.dtype.name, None, spec.shape,
        array.itemsize * math.prod(spec.shape),
        functools.partial(_read, part, place, spec.shape, dtype),
    )
  return checkpoints.Weights(entries)


def _read(part, place, shape, dtype, rows):
  """Reads rows of our first axis, which may be any of the file's."""
  start, stop, _ = rows.indices(shape[0])
  first = () if place.index is None else (place.index,)
  is_flattened = len(place.axes) > len(shape)
  index = [slice(None)] * len(place.axes)
  if not is_flattened:
    index[place.axes[0]] = slice(start, stop)
  values = part.read((*first, *index)).transpose(place.axes)
  if is_flattened:
    # Heads lie on an axis of their own; such matrices are small.
    values = values.reshape(shape)[start:stop]
  if dtype is None:
    return np.ascontiguousarray(values)
  return np.ascontiguousarray(values, dtype)


def _tokenizer(path, folder):
  for place in (folder, path, folder.parent, path.resolve().parent):
    path = place / _TOKENIZER
    if path.exists():
      data = regular_files.read_bytes(path, regular_files.LARGEST_TOKENIZER)
      with errors.about(path):
        return tokenizers.from_proto(data)
  return None
