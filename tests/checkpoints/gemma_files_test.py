"""A folder of Google's library and our weights are the same model."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import orbax.checkpoint as legacy
from orbax.checkpoint import v1 as ocp
import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import gemma_files
from gemma_qat.checkpoints import random_weights
from gemma_qat.model import config as model_config

TOWER = 'SigLiPFromPatches_0/siglip_encoder'


@pytest.fixture(scope='module')
def seeing():
  return random_weights.load('random:tiny+vision:2')


@pytest.fixture(scope='module')
def saved(seeing, tmp_path_factory):
  path = tmp_path_factory.mktemp('gemma') / 'saved'
  gemma_files.save(path, seeing, 'float32')
  return path


@pytest.fixture(scope='module')
def tree(saved):
  """What Orbax itself reads of it, flat."""
  with legacy.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(saved)


def test_float32_and_tower_come_back_bit_for_bit(saved, seeing):
  assert gemma_files.is_folder(saved)
  loaded = gemma_files.load(saved)
  assert loaded.layout == 'gemma'
  assert loaded.config == seeing.config
  assert loaded.vision.config == seeing.vision.config
  assert loaded.tokenizer.digest == seeing.tokenizer.digest
  _check_equal(loaded, seeing)


def test_orbax_reads_the_keys_and_axes_of_google(saved, seeing, tree):
  """Names, shapes and axes as `Gemma3_4B` has them, beside the einsums."""
  w = seeing.weights
  layer = 'transformer/layer_2'
  attention = f'{layer}/attn'
  np.testing.assert_array_equal(
      tree[f'{attention}/q_einsum']['w'],  # N D H
      w['layer_2/attn_q'].transpose(0, 2, 1),
  )
  kv = tree[f'{attention}/kv_einsum']['w']  # 2 K D H
  np.testing.assert_array_equal(kv[0], w['layer_2/attn_k'].transpose(0, 2, 1))
  np.testing.assert_array_equal(kv[1], w['layer_2/attn_v'].transpose(0, 2, 1))
  np.testing.assert_array_equal(
      tree[f'{attention}/attn_vec_einsum']['w'],  # N H D
      w['layer_2/attn_o'].transpose(1, 2, 0),
  )
  gating = tree[f'{layer}/mlp/gating_einsum']['w']  # 2 F D
  np.testing.assert_array_equal(gating[0], w['layer_2/mlp_gate'])
  np.testing.assert_array_equal(gating[1], w['layer_2/mlp_up'])
  np.testing.assert_array_equal(
      tree[f'{layer}/mlp/linear']['w'], w['layer_2/mlp_down'].T  # F D
  )
  np.testing.assert_array_equal(
      tree[f'{attention}/_key_norm']['scale'], w['layer_2/attn_k_norm']
  )
  np.testing.assert_array_equal(
      tree['transformer/embedder']['input_embedding'], w['embedding']
  )
  v = seeing.vision.weights
  block = f'{TOWER}/Transformer/encoderblock_1'
  query = tree[f'{block}/MultiHeadDotProductAttention_0/query']
  assert query['kernel'].shape == (32, 2, 16)  # inputs, heads, head width
  np.testing.assert_array_equal(
      query['kernel'].reshape(32, 32).T, v['layer_1/attn_q/kernel']
  )
  np.testing.assert_array_equal(
      query['bias'].reshape(32), v['layer_1/attn_q/bias']
  )
  out = tree[f'{block}/MultiHeadDotProductAttention_0/out']
  assert out['kernel'].shape == (2, 16, 32)
  np.testing.assert_array_equal(
      out['kernel'].reshape(32, 32).T, v['layer_1/attn_o/kernel']
  )
  kernel = tree[f'{TOWER}/embedding']['kernel']
  assert kernel.shape == (14, 14, 3, 32)  # rows, columns, colours, outputs
  assert kernel[3, 5, 1, 7] == v['patches/kernel'][7, 1, 3, 5]
  assert tree[TOWER]['pos_embedding'].shape == (1, 64, 32)
  assert tree[TOWER]['pos_embedding'].dtype == ml_dtypes.bfloat16


def test_every_orbax_restores_what_was_written(saved, tree):
  with legacy.PyTreeCheckpointer() as checkpointer:
    old = checkpointer.restore(saved)
  new = ocp.load(saved)
  said = ocp.metadata(saved).metadata
  assert set(old) == set(new) == set(tree) == set(said)
  for outer, arrays in tree.items():
    for inner, array in arrays.items():
      np.testing.assert_array_equal(old[outer][inner], array)
      np.testing.assert_array_equal(new[outer][inner], array)
      assert said[outer][inner].shape == array.shape
      assert said[outer][inner].dtype == array.dtype


def test_bfloat16_rounds_to_nearest_and_reports_each_piece(tiny, tmp_path):
  pieces = {}

  def on_piece(name, written, trained):
    pieces.setdefault(name, []).append((written, trained))

  gemma_files.save(tmp_path / 'x', tiny, on_piece=on_piece)
  loaded = gemma_files.load(tmp_path / 'x')
  assert loaded.metadata['dtype'] == 'bfloat16'
  assert set(pieces) == set(tiny.weights)
  for name, weight in tiny.weights.items():
    rounded = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(loaded.weights[name], rounded)
    written, trained = (np.concatenate(x) for x in zip(*pieces[name]))
    np.testing.assert_array_equal(written, rounded)
    np.testing.assert_array_equal(trained, weight)


def test_large_weights_are_written_in_pieces_and_read_by_rows(tmp_path):
  """An embedding of three pieces, each a chunk of its own."""
  base = random_weights.load('random:tiny:3')
  arrays = dict(base.weights)
  rng = np.random.default_rng(0)
  arrays['embedding'] = rng.standard_normal((600_000, 64), np.float32)
  big = dataclasses.replace(
      base, weights=checkpoints.from_arrays(arrays), tokenizer=None,
      config=dataclasses.replace(base.config, vocab_size=600_000),
  )
  pieces = []
  gemma_files.save(
      tmp_path / 'x', big,
      on_piece=lambda name, *_: pieces.append(name),
  )
  assert pieces.count('embedding') == 3
  loaded = gemma_files.load(tmp_path / 'x')
  entry = loaded.weights.entries['embedding']
  assert entry.shape == (600_000, 64)
  expected = arrays['embedding'].astype(ml_dtypes.bfloat16).astype(np.float32)
  for rows in (slice(0, 3), slice(262_000, 262_200), slice(None)):
    np.testing.assert_array_equal(entry.read(rows), expected[rows])


def test_rows_of_transposed_weights_are_those_of_the_whole(saved, seeing):
  loaded = gemma_files.load(saved)
  for name, entry in loaded.weights.entries.items():
    rows = slice(1, 1 + entry.shape[0] // 2)
    np.testing.assert_array_equal(entry.read(rows), seeing.weights[name][rows])
  for name, entry in loaded.vision.weights.entries.items():
    rows = slice(1, 1 + entry.shape[0] // 2)
    np.testing.assert_array_equal(
        entry.read(rows), seeing.vision.weights[name][rows]
    )


def test_quantized_weights_are_written_as_their_values(tiny, mixed, tmp_path):
  quantized = dataclasses.replace(tiny, weights=checkpoints.from_arrays(mixed))
  gemma_files.save(tmp_path / 'x', quantized, 'float32')
  loaded = gemma_files.load(tmp_path / 'x')
  for name, weight in quantized.weights.items():
    np.testing.assert_array_equal(
        loaded.weights[name], checkpoints.to_float32(weight)
    )


@pytest.mark.parametrize('form', [
    'nested', 'below params', 'training state', 'post-trained', 'stacked',
    'old gating', 'in default', 'old zarr',
])
def test_every_form_of_the_tree_is_read(form, seeing, tree, tmp_path):
  _write_form(form, tree, tmp_path / 'x')
  assert gemma_files.is_folder(tmp_path / 'x')
  loaded = gemma_files.load(tmp_path / 'x')
  assert loaded.vision.config == seeing.vision.config
  _check_equal(loaded, seeing)


def test_tokenizer_is_found_beside_as_kaggle_has_it(saved, seeing, tmp_path):
  shutil.copytree(saved, tmp_path / 'kaggle' / 'gemma3-tiny')
  inside = tmp_path / 'kaggle' / 'gemma3-tiny' / 'tokenizer.model'
  inside.rename(tmp_path / 'kaggle' / 'tokenizer.model')
  for path in ('kaggle', 'kaggle/gemma3-tiny'):
    assert gemma_files.is_folder(tmp_path / path)
    loaded = gemma_files.load(tmp_path / path)
    assert loaded.tokenizer.digest == seeing.tokenizer.digest
  (tmp_path / 'kaggle' / 'tokenizer.model').unlink()
  assert gemma_files.load(tmp_path / 'kaggle').tokenizer is None


def test_another_models_tokenizer_is_refused(tiny, tree, tmp_path):
  changed = {k: dict(v) for k, v in tree.items()}
  embedding = changed['transformer/embedder']['input_embedding']
  changed['transformer/embedder']['input_embedding'] = embedding[:500]
  _save(tmp_path / 'x', changed)
  (tmp_path / 'tokenizer.model').write_bytes(tiny.tokenizer.to_proto())
  with pytest.raises(errors.UserError, match='512 tokens.*500 rows'):
    gemma_files.load(tmp_path / 'x')


@pytest.mark.parametrize('change, reason', [
    (lambda t: t.pop('transformer/layer_3/mlp/linear'),
     'missing .layer_3/mlp/linear/w'),
    (lambda t: t.pop('transformer/layer_0/attn/q_einsum'),
     'layer_0/attn/q_einsum/w.*is missing'),
    (lambda t: t.update({'transformer/layer_3/mlp/x': {'w': np.ones(3)}}),
     'unknown .layer_3/mlp/x/w'),
    (lambda t: t.update({'transformer/final_norm': {'scale': np.ones(65)}}),
     r'final_norm/scale has shape \(65,\)'),
    (lambda t: t.update(
        {'transformer/final_norm': {'scale': np.ones(64, np.int32)}}),
     'final_norm/scale has type int32'),
    (lambda t: t.update({'layer_3': {'mlp': {'linear': np.ones((128, 64))}}}),
     'layer_3/mlp/linear/w twice'),
    (lambda t: t.pop(f'{TOWER}/embedding'), 'unknown .*vision/'),
    (lambda t: t.pop(f'{TOWER}/Transformer/encoder_norm'), 'encoder_norm'),
    (lambda t: [t.pop(k) for k in list(t) if 'layer_7/' in k],
     '270m.*27b'),
])
def test_wrong_trees_are_refused_by_name(change, reason, tree, tmp_path):
  changed = dict(tree)
  change(changed)
  _save(tmp_path / 'x', changed)
  with pytest.raises(errors.UserError, match=reason):
    gemma_files.load(tmp_path / 'x')


def test_spare_rows_of_images_are_passed_over(tree, seeing, tmp_path):
  embedder = dict(tree['transformer/embedder'])
  embedder['mm_input_embedding_extra'] = np.ones((3, 64), np.float32)
  _save(tmp_path / 'x', dict(tree) | {'transformer/embedder': embedder})
  loaded = gemma_files.load(tmp_path / 'x')
  (ignored,) = loaded.metadata['ignored_tensors']
  assert ignored.endswith('mm_input_embedding_extra')
  _check_equal(loaded, seeing)


def test_damaged_chunks_are_named_when_read(saved, tmp_path):
  shutil.copytree(saved, tmp_path / 'x')
  for file in (tmp_path / 'x' / 'd').iterdir():
    if file.stat().st_size > 10_000:
      file.write_bytes(file.read_bytes()[:-5000])
  with pytest.raises(errors.UserError, match='damaged'):
    checkpoints.dequantized(gemma_files.load(tmp_path / 'x'))


def test_other_folders_are_not_taken_for_one(tmp_path):
  assert not gemma_files.is_folder(tmp_path / 'nothing')
  assert not gemma_files.is_folder(tmp_path)
  _save(tmp_path / 'x', {'a': {'b': np.ones(3)}})
  assert not gemma_files.is_folder(tmp_path / 'x')
  with pytest.raises(errors.UserError, match='no Gemma 3'):
    gemma_files.load(tmp_path / 'x')
  (tmp_path / 'y').mkdir()
  with pytest.raises(errors.UserError, match='_METADATA'):
    gemma_files.load(tmp_path / 'y')


def test_a_failed_save_leaves_nothing(tiny, tmp_path):
  arrays = dict(tiny.weights)
  arrays['layer_3/mlp_down'] = np.full((64, 128), np.nan, np.float32)
  broken = dataclasses.replace(tiny, weights=checkpoints.from_arrays(arrays))
  with pytest.raises(errors.UserError, match='layer_3/mlp_down'):
    gemma_files.save(tmp_path / 'x', broken)
  with pytest.raises(errors.UserError, match='float16'):
    gemma_files.save(tmp_path / 'x', tiny, 'float16')
  assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_never_overwritten(saved, tiny):
  before = (saved / 'manifest.ocdbt').read_bytes()
  with pytest.raises(errors.UserError, match='exists already'):
    gemma_files.save(saved, tiny)
  assert (saved / 'manifest.ocdbt').read_bytes() == before


def test_metadata_is_that_of_orbax(saved):
  said = json.loads((saved / '_METADATA').read_text())
  assert said['use_ocdbt'] is True
  assert said['store_array_data_equal_to_fill_value'] is True


def _check_equal(loaded, expected):
  for name, weight in expected.weights.items():
    np.testing.assert_array_equal(loaded.weights[name], weight)
  for name, weight in expected.vision.weights.items():
    assert loaded.vision.weights[name].dtype == weight.dtype
    np.testing.assert_array_equal(loaded.vision.weights[name], weight)


def _save(path, tree, **options):
  handler = legacy.PyTreeCheckpointHandler(**options)
  with legacy.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, tree)


def _write_form(form, tree, path):
  """Turns the flat tree into another form, as the library would."""
  if form == 'stacked':
    return _save(path, _stacked(tree))
  if form == 'old gating':
    turn = lambda k, v: (
        {'w': v['w'].transpose(0, 2, 1)} if k.endswith('gating_einsum') else v
    )
    return _save(path, {k: turn(k, v) for k, v in tree.items()})
  if form == 'post-trained':
    prefix = 'rlx_networks/policy_network/'
    return _save(path, {prefix + k: v for k, v in tree.items()})
  if form == 'in default':
    return _save(path / 'default', tree)
  if form == 'old zarr':
    return _save(path, tree, use_ocdbt=False)
  nested = {}
  for outer, arrays in tree.items():
    outer = outer.removeprefix('transformer/').replace(
        'SigLiPFromPatches_0', 'vision_encoder'
    )
    *keys, last = outer.split('/')
    node = nested
    for key in keys:
      node = node.setdefault(key, {})
    if 'mlp' in keys:
      node[last] = arrays['w']
    else:
      node.setdefault(last, {}).update(arrays)
  if form == 'below params':
    nested = {'params': nested}
  if form == 'training state':
    nested = {
        'params': nested, 'step': 7, 'opt_state': {'mu': np.ones(3)},
        'collections': {},
    }
  return _save(path, nested)


def _stacked(tree):
  """Layers of one place in the pattern on one axis, the tower's on another."""
  config = model_config.variant('tiny')
  stacked = {}
  for outer, arrays in tree.items():
    for inner, array in arrays.items():
      level, slash, rest = outer.partition('/layer_')
      block = f'{TOWER}/Transformer/encoderblock'
      if slash:
        i, _, rest = rest.partition('/')
        place = int(i) % config.pattern
        key = f'{level}/stacked_layers/attention_type_{place}/{rest}'
      elif outer.startswith(block):
        key = f'{block}/{outer.removeprefix(block).partition("/")[2]}'
      else:
        stacked.setdefault(outer, {})[inner] = array
        continue
      stacked.setdefault(key, {}).setdefault(inner, []).append(array)
  return {
      outer: {
          k: np.stack(v) if isinstance(v, list) else v
          for k, v in arrays.items()
      }
      for outer, arrays in stacked.items()
  }
