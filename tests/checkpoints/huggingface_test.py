"""A Hugging Face folder is read as the model that it holds, or refused."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import huggingface
from gemma_qat.checkpoints import huggingface_config
from gemma_qat.checkpoints import huggingface_out
from gemma_qat.checkpoints import names
from gemma_qat.checkpoints import random_weights
from gemma_qat.model import config as model_config
from gemma_qat.model import weights as model_weights


@pytest.fixture
def folder(tiny, tmp_path):
  path = tmp_path / 'saved'
  huggingface_out.save(path, tiny, 'float32')
  return path


def test_float32_comes_back_bit_for_bit(folder, tiny):
  loaded = huggingface.load(folder)
  assert loaded.config == tiny.config
  for name, expected in tiny.weights.items():
    np.testing.assert_array_equal(loaded.weights[name], expected)
  assert loaded.tokenizer.digest == tiny.tokenizer.digest


@pytest.mark.parametrize(
    'prefix', ['language_model.model.', 'model.language_model.']
)
def test_vision_checkpoints_give_text_model_and_tower(tiny, tmp_path, prefix):
  """Two shards, a vision tower and a repeated head."""
  tensors, settings = _with_vision(tiny, prefix)
  _save_shards(tmp_path, tensors)
  (tmp_path / 'config.json').write_text(json.dumps(settings))
  loaded = huggingface.load(tmp_path)
  assert loaded.metadata['ignored_tensors'] == ['lm_head.weight']
  for name, expected in tiny.weights.items():
    np.testing.assert_array_equal(loaded.weights[name], expected)
  vision = random_weights.load('random:tiny+vision').vision
  assert loaded.vision.config == vision.config
  for name, expected in vision.weights.items():
    read = loaded.vision.weights[name]
    assert read.dtype == expected.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read, expected)


def test_a_missing_part_of_the_tower_is_named(tiny, tmp_path):
  tensors, settings = _with_vision(tiny, 'language_model.model.')
  name = names.vision(
      random_weights.load('random:tiny+vision').vision.config
  )['layer_1/mlp_up/bias'].huggingface
  del tensors[name]
  _save_shards(tmp_path, tensors)
  (tmp_path / 'config.json').write_text(json.dumps(settings))
  with pytest.raises(errors.UserError, match=name):
    huggingface.load(tmp_path)


def _with_vision(tiny, prefix):
  """Tensors and config.json of tiny with the small tower."""
  specs = model_weights.by_layer_specs(tiny.config)
  tensors = {
      file_name: tiny.weights[name].reshape(names.file_shape(specs[name]))
      for name, file_name in names.huggingface(tiny.config, prefix).items()
  }
  tensors['lm_head.weight'] = tensors[f'{prefix}embed_tokens.weight']
  vision = random_weights.load('random:tiny+vision').vision
  before = 'model.' if prefix.startswith('model') else ''
  for name, file_names in names.vision(vision.config).items():
    tensors[before + file_names.huggingface] = vision.weights[name]
  c = vision.config
  return tensors, {
      'model_type': 'gemma3',
      'text_config': huggingface_config.write(tiny.config, 'float32', {}),
      'mm_tokens_per_image': c.tokens_per_image,
      'vision_config': {
          'image_size': c.image_size, 'patch_size': c.patch_size,
          'hidden_size': c.width, 'intermediate_size': c.mlp_dim,
          'num_hidden_layers': c.num_layers,
          'num_attention_heads': c.num_heads,
      },
  }


def test_padded_vocabulary_is_trimmed(tiny, tmp_path):
  config = dataclasses.replace(tiny.config, embed_dim=32, vocab_size=262_208)
  specs = model_weights.by_layer_specs(config)
  zeros = lambda name: np.zeros(specs[name].shape, np.float32)
  weights = {name: zeros(name) for name in specs}
  weights['embedding'][:, 0] = np.arange(262_208)
  padded = dataclasses.replace(
      tiny, config=config, weights=checkpoints.from_arrays(weights),
      tokenizer=None,
  )
  huggingface_out.save(tmp_path / 'x', padded, 'float32')
  loaded = huggingface.load(tmp_path / 'x')
  assert loaded.config.vocab_size == 262_144
  np.testing.assert_array_equal(
      loaded.weights['embedding'][:, 0], np.arange(262_144)
  )


@pytest.mark.parametrize('variant', list(model_config.VARIANTS))
def test_written_config_is_read_back(variant):
  config = model_config.variant(variant)
  written = json.loads(
      json.dumps(huggingface_config.write(config, 'bfloat16', {}))
  )
  assert huggingface_config.read(written, 'x', config.vocab_size) == config
  # transformers 5 refuses 256.0.
  assert isinstance(written['query_pre_attn_scalar'], int)


@pytest.mark.parametrize('dropped', [
    ['rope_parameters', 'layer_types'],
    ['rope_theta', 'rope_local_base_freq', 'rope_scaling',
     'sliding_window_pattern'],
])
def test_older_and_newer_keys_each_suffice(dropped):
  config = model_config.variant('27b')
  written = huggingface_config.write(config, 'bfloat16', {})
  for key in dropped:
    del written[key]
  assert huggingface_config.read(written, 'x', config.vocab_size) == config


def test_sparse_config_of_the_published_4b_is_read():
  text = {
      'hidden_size': 2560, 'intermediate_size': 10_240,
      'model_type': 'gemma3_text', 'num_hidden_layers': 34,
      'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
      'sliding_window': 1024,
  }
  config = {'model_type': 'gemma3', 'text_config': text}
  read = huggingface_config.read(config, 'x', 262_144)
  assert read == model_config.variant('4b')


@pytest.mark.parametrize('change, reason', [
    ({'model_type': 'gemma2'}, 'gemma2'),
    ({'final_logit_softcapping': 30.0}, 'final_logit_softcapping'),
    ({'tie_word_embeddings': False}, 'tie_word_embeddings'),
    ({'hidden_size': None}, 'hidden_size'),
    ({'hidden_size': 'many'}, 'hidden_size'),
    ({'hidden_size': float('inf')}, 'wrong kind'),
    ({'rope_parameters': 'linear'}, 'wrong kind'),
    ({'layer_types': ['full_attention'] * 2}, 'layer_types'),
    ({'rope_parameters': {'full_attention': {'rope_type': 'yarn'}}}, 'yarn'),
])
def test_configs_that_we_do_not_compute_are_refused(change, reason, tiny):
  written = huggingface_config.write(tiny.config, 'bfloat16', {}) | change
  with pytest.raises(errors.UserError, match=reason):
    huggingface_config.read(written, 'x', 512)


def test_nan_is_refused_by_name_when_read(folder):
  path = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  tensors['model.layers.3.mlp.down_proj.weight'][5, 7] = np.inf
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(errors.UserError, match='saved: layer_3/mlp_down'):
    checkpoints.dequantized(huggingface.load(folder))


def test_cut_weights_are_refused_at_every_length(folder):
  path = folder / 'model.safetensors'
  whole = path.read_bytes()
  for length in (0, 5, 100, 5000, len(whole) - 1):
    path.write_bytes(whole[:length])
    with pytest.raises(errors.UserError, match='model.safetensors'):
      huggingface.load(folder)


def test_folders_without_safetensors_are_refused(folder):
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  with pytest.raises(errors.UserError, match='neither model.safetensors'):
    huggingface.load(folder)


def test_missing_and_unknown_tensors_are_named(folder):
  path = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  moved = tensors.pop('model.layers.1.mlp.up_proj.weight')
  tensors['model.layers.1.mlp.up_proj.weight_packed'] = moved
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(
      errors.UserError, match='up_proj.weight.*up_proj.weight_packed'
  ):
    huggingface.load(folder)


def test_an_index_that_points_elsewhere_is_refused(folder):
  index = {'weight_map': {'model.norm.weight': '../../secret.safetensors'}}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(errors.UserError, match='elsewhere'):
    huggingface.load(folder)


def test_damaged_json_is_refused(folder):
  (folder / 'config.json').write_text('{"model_type": ')
  with pytest.raises(errors.UserError, match='config.json'):
    huggingface.load(folder)


def _save_shards(folder, tensors):
  ordered = sorted(tensors)
  weight_map = {}
  for i, part in enumerate((ordered[::2], ordered[1::2])):
    shard = f'model-0000{i + 1}-of-00002.safetensors'
    safetensors.numpy.save_file({n: tensors[n] for n in part}, folder / shard)
    weight_map |= {n: shard for n in part}
  (folder / 'model.safetensors.index.json').write_text(
      json.dumps({'weight_map': weight_map})
  )
