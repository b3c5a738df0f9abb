"""A vision tower goes through its own GGUF unchanged."""

import dataclasses

import gguf
import ml_dtypes
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import gguf_files
from gemma_qat.checkpoints import gguf_vision
from gemma_qat.checkpoints import names
from gemma_qat.checkpoints import random_weights
from gemma_qat.model import vision as vision_config


@pytest.fixture(scope='module')
def tower():
  return random_weights.load('random:tiny+vision:3').vision


@pytest.mark.parametrize('float_type', ['bf16', 'f32'])
def test_bfloat16_towers_come_back_exactly(tower, tmp_path, float_type):
  path = tmp_path / 'mmproj-x.gguf'
  _, change = gguf_vision.save(path, tower, 'x', float_type)
  assert change == 0
  loaded = gguf_vision.load(path)
  assert loaded.config == tower.config
  for name, expected in tower.weights.items():
    np.testing.assert_array_equal(
        loaded.weights[name].astype(np.float64), expected.astype(np.float64),
        err_msg=name,
    )


def test_a_negative_zero_stays_one(tower, tmp_path):
  weights = {n: np.array(w) for n, w in tower.weights.items()}
  weights['layer_0/mlp_up/kernel'][0, 0] = -0.0
  odd = tower._replace(weights=checkpoints.from_arrays(weights))
  gguf_vision.save(tmp_path / 'x.gguf', odd, 'x')
  loaded = gguf_vision.load(tmp_path / 'x.gguf').weights
  assert np.signbit(loaded['layer_0/mlp_up/kernel'][0, 0])


def test_float16_says_how_far_it_rounds(tower, tmp_path):
  weights = {n: np.array(w) for n, w in tower.weights.items()}
  # Below the smallest float16.
  weights['layer_0/mlp_up/kernel'][0, 0] = ml_dtypes.bfloat16(2.0**-26)
  odd = tower._replace(weights=checkpoints.from_arrays(weights))
  _, change = gguf_vision.save(tmp_path / 'x.gguf', odd, 'x', 'f16')
  assert change == 2.0**-26


def test_the_gguf_library_reads_names_types_and_gains(tower, tmp_path):
  gguf_vision.save(tmp_path / 'x.gguf', tower, 'A name')
  reader = gguf.GGUFReader(tmp_path / 'x.gguf')
  value = lambda key: reader.fields[key].contents()
  assert value('general.architecture') == 'clip'
  assert value('general.type') == 'mmproj'
  assert value('clip.projector_type') == 'gemma3'
  assert value('clip.has_vision_encoder') is True
  assert value('clip.vision.image_size') == 112
  assert value('clip.vision.projection_dim') == 64
  by_name = {t.name: t for t in reader.tensors}
  assert set(by_name) == {n.gguf for n in names.vision(tower.config).values()}
  norm = by_name['mm.soft_emb_norm.weight']
  np.testing.assert_array_equal(
      norm.data, tower.weights['projector/norm'].astype(np.float32) + 1
  )
  kinds = {n: t.tensor_type.name for n, t in by_name.items()}
  assert kinds['v.blk.0.ffn_up.weight'] == 'BF16'
  assert {kinds[n] for n in (
      'v.blk.1.ffn_down.bias', 'v.patch_embd.weight', 'v.position_embd.weight',
      'mm.input_projection.weight', 'v.post_ln.weight',
  )} == {'F32'}


def test_a_text_model_finds_its_tower_beside_it(tiny, tower, tmp_path):
  path = tmp_path / 'model.gguf'
  gguf_files.save(path, tiny.config, tiny.weights, tiny.tokenizer)
  assert gguf_files.load(path).vision is None
  gguf_vision.save(tmp_path / 'mmproj-other.gguf', tower, 'x')
  assert gguf_files.load(path).vision.config == tower.config
  # Of several, only the one with the model's own name is certain.
  gguf_vision.save(tmp_path / 'mmproj-third.gguf', tower, 'x')
  assert gguf_files.load(path).vision is None
  gguf_vision.save(tmp_path / gguf_vision.name_for(path), tower, 'x')
  assert gguf_files.load(path).vision.config == tower.config


def test_the_tower_of_another_size_is_left_alone(tiny, tower, tmp_path):
  gguf_files.save(
      tmp_path / 'model.gguf', tiny.config, tiny.weights, tiny.tokenizer
  )
  config = dataclasses.replace(tower.config, text_dim=128)
  weights = {
      n: np.zeros(s.shape, np.float32)
      for n, s in vision_config.specs(config).items()
  }
  gguf_vision.save(
      tmp_path / 'mmproj-big.gguf',
      checkpoints.Vision(config, checkpoints.from_arrays(weights)), 'x',
  )
  assert gguf_files.load(tmp_path / 'model.gguf').vision is None


def test_what_llama_cpp_could_not_say_is_refused(tower, tmp_path):
  odd = tower._replace(
      config=dataclasses.replace(tower.config, tokens_per_image=16)
  )
  with pytest.raises(errors.UserError, match='pools 16'):
    gguf_vision.save(tmp_path / 'x.gguf', odd, 'x')
  with pytest.raises(errors.UserError, match='q4_0'):
    gguf_vision.save(tmp_path / 'x.gguf', tower, 'x', 'q4_0')
  assert not list(tmp_path.iterdir())


def test_damage_is_named(tower, tmp_path):
  path = tmp_path / 'x.gguf'
  gguf_vision.save(path, tower, 'x')
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(errors.UserError, match='truncated'):
    gguf_vision.load(path)
  path.write_bytes(data.replace(b'clip.vision.patch_size', b'clip.vision.patch_sise'))
  with pytest.raises(errors.UserError, match='patch_size'):
    gguf_vision.load(path)
  path.write_bytes(data.replace(b'v.blk.1.ln2.bias', b'v.blk.1.ln3.bias'))
  with pytest.raises(errors.UserError, match='v.blk.1.ln2.bias'):
    gguf_vision.load(path)
