"""How is a tree written as Orbax would, without ever holding it?

Orbax takes whole arrays; the embedding of 27B alone is 2.8 GB. So the arrays
are written here a piece at a time, each piece one chunk, into the very store
that Orbax keeps its own in (OCDBT, zarr, zstd), and the JSON around them is
made by Orbax itself, from a tree of the same names and one number each.
"""

from collections.abc import Callable
import json
import pathlib
import tempfile

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import gemma_names
from gemma_qat.checkpoints import orbax_arrays
from gemma_qat.model import vision as vision_config
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import rules

# Bytes that wait to be committed together: each commit waits for the disk.
_COMMIT = 2**25

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}


def write(
    folder: pathlib.Path,
    checkpoint: checkpoints.Checkpoint,
    dtype: str,
    on_piece: Callable[[str, np.ndarray, np.ndarray], None] | None,
) -> None:
  """Fills an empty folder; arguments as of `gemma_files.save`."""
  config = checkpoint.config
  places = gemma_names.places(config)
  shapes = gemma_names.file_shapes(model_weights.by_layer_specs(config), places)
  writer = _Writer(folder, shapes)
  for name, place in places.items():
    for rows, weight in checkpoint.weights.pieces(name):
      trained = checkpoints.to_float32(weight)
      rules.check_finite(f'{checkpoint.source}: {name}', trained)
      rounded = trained.astype(DTYPES[dtype])
      writer.put(place, rows, rounded)
      if on_piece is not None:
        on_piece(name, rounded.astype(np.float32), trained)
  if checkpoint.vision is not None:
    _write_vision(writer, checkpoint.vision)
  writer.commit()
  _write_metadata(folder, writer.shapes)


class _Writer:
  """Arrays under way; a piece is a slice of one of the file's axes."""

  def __init__(self, folder, shapes):
    self.shapes = dict(shapes)
    self._folder = folder
    self._context = ts.Context()
    self._key, self._store = None, None
    self._transaction, self._waiting = ts.Transaction(), 0

  def put(self, place, rows, values):
    """Writes rows of our first axis; the first ones set the chunks' size."""
    values = values.transpose(np.argsort(place.axes))
    axis = place.axes[0]
    index = [slice(None)] * len(place.axes)
    index[axis] = rows
    if place.index is not None:
      values, axis = values[None], axis + 1
      index = [slice(place.index, place.index + 1), *index]
    if place.key != self._key:
      self._key = place.key
      self._store = self._create(place.key, values.shape, values.dtype)
    self._store[tuple(index)].write(values).result()
    self._waiting += values.nbytes
    if self._waiting > _COMMIT:
      self.commit()

  def commit(self):
    """Brings to the disk what was put so far."""
    self._transaction.commit_async().result()
    self._transaction, self._waiting = ts.Transaction(), 0
    if self._store is not None:
      self._store = self._store.with_transaction(self._transaction)

  def _create(self, key, chunk, dtype):
    array = orbax_arrays.spec(self._folder, '.'.join(gemma_names.flat(key)))
    shape = self.shapes[key]
    array['metadata'] = {
        'shape': list(shape),
        'chunks': list(chunk),
        'dtype': ts.dtype(dtype).name if dtype == ml_dtypes.bfloat16
                 else np.dtype(dtype).str,
        'compressor': {'id': 'zstd', 'level': 1},
    }
    array['store_data_equal_to_fill_value'] = True
    return ts.open(
        array, create=True, context=self._context,
        transaction=self._transaction,
    ).result()


def _write_vision(writer, vision):
  specs = vision_config.specs(vision.config)
  places = gemma_names.vision_places(vision.config)
  writer.shapes |= gemma_names.file_shapes(
      specs, places, vision.config.num_heads
  )
  for name, place in places.items():
    values = np.asarray(vision.weights[name])
    shape = writer.shapes[place.key]
    axes = [shape[place.index is not None :][axis] for axis in place.axes]
    writer.put(place, slice(None), values.reshape(axes))


def _write_metadata(folder, shapes):
  """Lets Orbax describe the tree, then puts in the shapes."""
  tree = {}
  for key in shapes:
    outer, inner = gemma_names.flat(key)
    tree.setdefault(outer, {})[inner] = np.zeros(1, np.float32)
  with tempfile.TemporaryDirectory() as temporary:
    model = pathlib.Path(temporary, 'model')
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(model, tree)
    described = json.loads((model / orbax_arrays.METADATA).read_text())
    last = (model / '_CHECKPOINT_METADATA').read_bytes()
  by_keys = {gemma_names.flat(key): shape for key, shape in shapes.items()}
  for entry in described['tree_metadata'].values():
    keys = tuple(part['key'] for part in entry['key_metadata'])
    if 'write_shape' in entry['value_metadata']:
      entry['value_metadata']['write_shape'] = list(by_keys[keys])
  (folder / orbax_arrays.METADATA).write_text(json.dumps(described))
  (folder / '_CHECKPOINT_METADATA').write_bytes(last)
