"""Slices of Orbax's arrays are exact, lazy, and refused when damaged."""

import gc
import json
import pathlib
import resource
import shutil

import ml_dtypes
import numpy as np
import orbax.checkpoint as legacy
from orbax.checkpoint import v1 as ocp
import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import orbax_arrays

TREE = {
    'layer_0/attn': {
        'w': np.arange(1, 97, dtype=np.float32).reshape(4, 6, 4),
        'b': np.arange(7, dtype=np.int8),
    },
    'deep': {'er': {'x': np.arange(5.0).astype(ml_dtypes.bfloat16)}},
    'zeros': np.zeros((3, 2), np.float32),
}
FORMS = ['v1', 'ocdbt', 'ocdbt zarr3', 'zarr', 'zarr3']


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """The tree in every form that some Orbax wrote."""
  root = tmp_path_factory.mktemp('forms')
  ocp.save_checkpointables(root / 'step', {'v1': TREE})
  found = {'v1': root / 'step' / 'v1'}
  for form in FORMS[1:]:
    handler = legacy.PyTreeCheckpointHandler(
        use_ocdbt='ocdbt' in form, use_zarr3='zarr3' in form
    )
    found[form] = root / form
    with legacy.Checkpointer(handler) as checkpointer:
      checkpointer.save(found[form], TREE)
  return found


@pytest.fixture(params=FORMS)
def folder(request, folders):
  return folders[request.param]


@pytest.fixture
def copy(folders, tmp_path):
  """A folder whose chunks are files, to be damaged."""
  shutil.copytree(folders['zarr'], tmp_path / 'copy')
  return tmp_path / 'copy'


def test_every_form_gives_shapes_types_and_slices(folder):
  tree = orbax_arrays.open_tree(folder)
  assert {n: (a.shape, a.dtype.name) for n, a in tree.items()} == {
      'layer_0/attn/w': ((4, 6, 4), 'float32'),
      'layer_0/attn/b': ((7,), 'int8'),
      'deep/er/x': ((5,), 'bfloat16'),
      'zeros': ((3, 2), 'float32'),
  }
  w = TREE['layer_0/attn']['w']
  read = tree['layer_0/attn/w'].read
  np.testing.assert_array_equal(read(()), w)
  np.testing.assert_array_equal(read((2,)), w[2])
  np.testing.assert_array_equal(read((slice(1, 3), 5)), w[1:3, 5])
  np.testing.assert_array_equal(
      read((3, slice(None), slice(2, 4))), w[3, :, 2:4]
  )
  np.testing.assert_array_equal(
      tree['deep/er/x'].read((slice(1, 4),)), TREE['deep']['er']['x'][1:4]
  )
  np.testing.assert_array_equal(tree['zeros'].read(()), TREE['zeros'])


@pytest.mark.skipif(
    not pathlib.Path('/proc/self/statm').exists(), reason='needs Linux'
)
def test_opening_again_and_again_takes_no_memory(folders):
  pages = lambda: int(
      pathlib.Path('/proc/self/statm').read_text().split()[1]
  )
  def open_often():
    for _ in range(600):
      orbax_arrays.open_tree(folders['zarr3'])
    gc.collect()
  open_often()
  before = pages()
  open_often()
  # Asking tensorstore for a codec as JSON lost 9 MB of it.
  assert (pages() - before) * resource.getpagesize() < 3e6


def test_a_slice_touches_its_own_chunks_only(tmp_path):
  """Another row's chunk may be broken and the slice is still right."""
  context = ocp.Context()
  context.array.saving.use_ocdbt = False
  context.array.saving.use_zarr3 = False
  context.array.saving.storage_options.shard_axes = (0,)
  x = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
  with context:
    ocp.save_checkpointables(tmp_path / 'step', {'t': {'x': x}})
  folder = tmp_path / 'step' / 't'
  chunks = sorted(p.name for p in (folder / 'x').iterdir() if p.name[0] != '.')
  assert len(chunks) == 4
  (broken,) = (folder / 'x').glob('2.*')
  broken.write_bytes(broken.read_bytes()[:-9])
  array = orbax_arrays.open_tree(folder)['x']
  np.testing.assert_array_equal(array.read((slice(0, 2),)), x[:2])
  np.testing.assert_array_equal(array.read((3,)), x[3])
  with pytest.raises(errors.UserError, match='damaged, x cannot be read'):
    array.read((slice(1, 3),))


def test_a_missing_chunk_is_refused_where_it_would_read_as_zeros(copy):
  for chunk in (copy / 'layer_0' / 'attn.w').glob('0.*'):
    chunk.unlink()
  tree = orbax_arrays.open_tree(copy)
  with pytest.raises(errors.UserError, match='1 of 1 chunks of layer_0/attn/w'):
    tree['layer_0/attn/w'].read((0,))
  np.testing.assert_array_equal(tree['layer_0/attn/b'].read(()), np.arange(7))


def test_lost_and_cut_files_are_refused(folder, tmp_path):
  """At every length of every file that holds arrays."""
  def read_all(folder):
    return {
        name: array.read(())
        for name, array in orbax_arrays.open_tree(folder).items()
    }

  whole = {k: v.tobytes() for k, v in read_all(folder).items()}
  files = sorted(
      p.relative_to(folder) for p in folder.rglob('*') if p.is_file()
  )
  refused = 0
  for i, file in enumerate(files):
    if file.parts[0] in ('array_metadatas',) or file.name.startswith('_S'):
      continue
    size = (folder / file).stat().st_size
    for length in (None, 0, size // 2, size - 1):
      damaged = tmp_path / f'{i} {length}'
      shutil.copytree(folder, damaged)
      if length is None:
        (damaged / file).unlink()
      else:
        (damaged / file).write_bytes((folder / file).read_bytes()[:length])
      try:
        found = {k: v.tobytes() for k, v in read_all(damaged).items()}
      except errors.UserError:
        refused += 1
      else:
        # Not every file is needed; none may give other numbers.
        assert found == whole, file
      shutil.rmtree(damaged)
  assert refused > 8


@pytest.mark.parametrize('change', [
    {'shape': [10**15]},
    {'shape': [10**8, 10**7], 'chunks': [1, 1]},
    {'chunks': [10**12, 6, 4]},
    {'chunks': [4, 6, 5]},
    {'dtype': '<c8'},
    {'dtype': [['f', '<f4'], ['g', '<f4']]},
    {'compressor': {'id': 'nothing'}},
    {'zarr_format': 9},
])
def test_forged_arrays_are_refused_when_opened(copy, change):
  path = copy / 'layer_0' / 'attn.w' / '.zarray'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(errors.UserError, match='layer_0/attn/w'):
    orbax_arrays.open_tree(copy)


@pytest.mark.parametrize('key', [
    '..', '../../etc', 'a/../../b', '/etc/passwd', '', 'a//b', './x', 'x\0',
])
def test_names_that_lead_out_are_refused(copy, key):
  path = copy / orbax_arrays.METADATA
  said = json.loads(path.read_text())
  entry = next(iter(said['tree_metadata'].values()))
  entry['key_metadata'] = [{'key': key, 'key_type': 2}]
  path.write_text(json.dumps(said))
  with pytest.raises(errors.UserError, match='leads out'):
    orbax_arrays.open_tree(copy)


@pytest.mark.parametrize('text', [
    '', '{', '[]', '{}', '{"tree_metadata": 3}', '{"tree_metadata": {"x": 1}}',
    '{"tree_metadata": {"x": {"key_metadata": [{"key": "x"}]}}}', '[' * 10**5,
])
def test_damaged_metadata_is_refused(copy, text):
  (copy / orbax_arrays.METADATA).write_text(text)
  with pytest.raises(errors.UserError, match=orbax_arrays.METADATA):
    orbax_arrays.open_tree(copy)


def test_a_folder_without_a_tree_is_refused(tmp_path):
  assert not orbax_arrays.is_tree(tmp_path)
  with pytest.raises(errors.UserError, match=orbax_arrays.METADATA):
    orbax_arrays.open_tree(tmp_path)


@pytest.mark.parametrize('form', ['zarr', 'zarr3'])
def test_more_than_files_can_hold_is_refused(folders, form, tmp_path):
  """4 GB of zeros, none of which is stored."""
  folder = tmp_path / form
  shutil.copytree(folders[form], folder)
  shape = [2**15, 2**15]
  (said,) = (folder / 'zeros').glob('*zar*')
  contents = json.loads(said.read_text())
  contents['shape'] = shape
  if form == 'zarr':
    contents['chunks'] = shape
  else:
    contents['chunk_grid']['configuration']['chunk_shape'] = shape
    contents['codecs'] = [{'name': 'bytes', 'configuration': {
        'endian': 'little'
    }}]
  said.write_text(json.dumps(contents))
  arrays = orbax_arrays.open_tree(folder)
  with pytest.raises(errors.UserError, match='claims 4,294,96.* bytes of arr'):
    orbax_arrays.check_density(folder, arrays)
