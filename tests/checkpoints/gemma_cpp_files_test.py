"""An .sbs file holds the weights where and as gemma.cpp looks for them.

Nothing public loads such a file, so it is read here by a decoder of its own:
the container by its directory, SFP8 by a table of exponents and mantissas.
"""

import dataclasses
import resource

import ml_dtypes
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import gemma_cpp_files
from gemma_qat.checkpoints import gemma_cpp_tensors
from gemma_qat.checkpoints import random_weights
from gemma_qat.checkpoints import sbs_blobs
from gemma_qat.model import config as model_config
from gemma_qat.model import vision as vision_config

LAYER = 7


def _sfp_value(byte):
  sign, m = (-1.0 if byte & 0x80 else 1.0), byte & 0x7F
  if m == 0:
    return 0.0
  bits, bias = (3, 15) if m >= 64 else (2, 23)
  return sign * (1 + (m % 2**bits) / 2**bits) * 2.0 ** ((m >> bits) - bias)


_SFP = np.array([_sfp_value(byte) for byte in range(256)], np.float32)


def _decode(path):
  """Reads every tensor: name -> float32 [rows, cols]."""
  decoded = {}
  for name, (tensor, blob) in gemma_cpp_files.read_tensors(path).items():
    data = np.frombuffer(sbs_blobs.read_bytes(path, blob), np.uint8)
    if tensor.type == 'SFP':
      assert not np.any(data == 0x80)
      values = _SFP[data] * np.float32(tensor.scale)
    else:
      dtype = {'BF16': ml_dtypes.bfloat16, 'F32': np.float32}[tensor.type]
      values = data.view(dtype).astype(np.float32)
      assert tensor.scale == 1
    decoded[name] = values.reshape(tensor.rows, tensor.cols)
  return decoded


def _assert_nearest(found, given, scale=1.0):
  """Each value is the nearest SFP8 number, but for rounding to bfloat16.

  That moves a value by 2^-8 of itself at most, and so the choice.
  """
  table = np.unique(np.delete(_SFP, 0x80)) * np.float32(scale)
  above = np.searchsorted(table, given).clip(1, len(table) - 1)
  best = np.minimum(
      np.abs(table[above] - given), np.abs(table[above - 1] - given)
  )
  assert np.all(np.abs(found - given) <= best + np.abs(given) * 2.0**-7)
  assert np.abs(found - given).max() > 0


@pytest.fixture(scope='module')
def with_vision():
  return random_weights.load('random:tiny+vision:1')


@pytest.fixture(scope='module')
def saved(with_vision, tmp_path_factory):
  path = tmp_path_factory.mktemp('sbs') / 'tiny.sbs'
  written = gemma_cpp_files.save(path, with_vision, custom=True)
  return path, written


def test_text_weights_come_back(saved, with_vision):
  path, _ = saved
  found = _decode(path)
  weights = with_vision.weights
  d, h = with_vision.config.embed_dim, with_vision.config.head_dim
  for i in range(with_vision.config.num_layers):
    w = lambda name, i=i: weights[f'layer_{i}/{name}']
    k, v = w('attn_k'), w('attn_v')
    # Queries, then key and value of each head in turn.
    qkv = [w('attn_q').reshape(-1, d), k[0], v[0], k[1], v[1]]
    _assert_nearest(found[f'qkv_ein_{i}'], np.concatenate(qkv))
    _assert_nearest(found[f'att_w_{i}'], w('attn_o').reshape(d, 4 * h))
    _assert_nearest(
        found[f'gating_ein_{i}'],
        np.concatenate([w('mlp_gate'), w('mlp_up')]),
    )
    _assert_nearest(found[f'linear_w_{i}'], w('mlp_down'))
    for ours, theirs in (
        ('attn_pre_norm', 'pre_att_ns'), ('attn_post_norm', 'post_att_ns'),
        ('mlp_pre_norm', 'pre_ff_ns'), ('mlp_post_norm', 'post_ff_ns'),
        ('attn_q_norm', 'query_norm'), ('attn_k_norm', 'key_norm'),
    ):
      np.testing.assert_array_equal(found[f'{theirs}_{i}'][0], w(ours))
  np.testing.assert_array_equal(
      found['c_final_norm'][0], weights['final_norm']
  )
  np.testing.assert_array_equal(
      found['c_embedding'],
      weights['embedding'].astype(ml_dtypes.bfloat16).astype(np.float32),
  )


def test_the_tower_comes_back_unchanged(saved, with_vision):
  path, _ = saved
  found = _decode(path)
  weights = with_vision.vision.weights
  w = lambda name: weights[name].astype(np.float32)
  for ours, theirs in (
      ('positions', 'img_pos_emb'), ('patches/bias', 'img_emb_bias'),
      ('post_norm/scale', 'enc_norm_scale'),
      ('post_norm/bias', 'enc_norm_bias'), ('projector/norm', 'mm_embed_norm'),
      ('layer_1/attn_o/kernel', 'attn_out_w_1'),
      ('layer_1/attn_o/bias', 'attn_out_b_1'),
      ('layer_1/mlp_up/kernel', 'linear_0_w_1'),
      ('layer_1/mlp_up/bias', 'linear_0_b_1'),
      ('layer_1/mlp_down/kernel', 'linear_1_w_1'),
      ('layer_1/mlp_down/bias', 'linear_1_b_1'),
      ('layer_1/norm_1/scale', 'ln_0_scale_1'),
      ('layer_1/norm_1/bias', 'ln_0_bias_1'),
      ('layer_1/norm_2/scale', 'ln_1_scale_1'),
      ('layer_1/norm_2/bias', 'ln_1_bias_1'),
  ):
    expected = w(ours)
    np.testing.assert_array_equal(
        found[theirs], expected.reshape(-1, expected.shape[-1]), err_msg=ours
    )
  np.testing.assert_array_equal(
      found['img_head_kernel'], w('projector/kernel').T
  )
  np.testing.assert_array_equal(found['img_head_bias'], np.zeros((1, 64)))
  patches = found['img_emb_kernel'].reshape(32, 14, 14, 3)
  np.testing.assert_array_equal(
      patches[:, :, :, 2], w('patches/kernel')[:, 2]
  )
  # [heads, query / key / value, head width ...]; two heads of 16.
  kernel = found['qkv_ein_w_0'].reshape(2, 3, 16, 32)
  bias = found['qkv_ein_b_0'].reshape(2, 3, 16)
  for i, name in enumerate(('attn_q', 'attn_k', 'attn_v')):
    whole = w(f'layer_0/{name}/kernel').reshape(2, 16, 32)
    np.testing.assert_array_equal(kernel[:, i], whole)
    whole = w(f'layer_0/{name}/bias').reshape(2, 16)
    np.testing.assert_array_equal(bias[:, i], whole)


def test_the_other_blobs_are_there_and_the_bytes_add_up(saved, with_vision):
  path, written = saved
  blobs = sbs_blobs.read(path)
  tensors = gemma_cpp_files.read_tensors(path)
  assert list(blobs) == [*tensors, 'config', 'tokenizer', 'toc']
  assert all(len(name) <= 16 for name in blobs)
  proto = sbs_blobs.read_bytes(path, blobs['tokenizer'])
  assert proto == with_vision.tokenizer.to_proto()
  for kind, count in written.items():
    found = [b.num_bytes for t, b in tensors.values() if t.type == kind]
    assert sum(found) == count
  assert sum(written.values()) == sum(b.num_bytes for _, b in tensors.values())


def test_without_a_tower_no_tensor_of_one_is_written(tiny, tmp_path):
  path = tmp_path / 'x.sbs'
  written = gemma_cpp_files.save(path, tiny, custom=True)
  c = tiny.config
  tensors = gemma_cpp_files.read_tensors(path)
  assert len(tensors) == 2 + 10 * c.num_layers
  assert written['BF16'] == 2 * c.vocab_size * c.embed_dim
  assert 'img_pos_emb' not in tensors


def test_the_caller_sees_what_was_written_for_every_weight(saved, with_vision):
  path, _ = saved
  seen = {}

  def on_piece(name, written, given):
    seen.setdefault(name, []).append((written, given))

  gemma_cpp_files.save(
      path.with_name('again.sbs'), with_vision, on_piece, custom=True
  )
  assert path.read_bytes() == path.with_name('again.sbs').read_bytes()
  assert set(seen) == set(with_vision.weights)
  for name, pieces in seen.items():
    written, given = (
        np.concatenate([np.ravel(p[i]) for p in pieces]) for i in (0, 1)
    )
    np.testing.assert_array_equal(given, np.ravel(with_vision.weights[name]))
    assert written.dtype == given.dtype == np.float32
  down = np.concatenate([w for w, _ in seen[f'layer_{LAYER}/mlp_down']])
  np.testing.assert_array_equal(down, _decode(path)[f'linear_w_{LAYER}'])


def _with(checkpoint, changes):
  arrays = {n: changes.get(n, checkpoint.weights[n])
            for n in checkpoint.weights}
  return dataclasses.replace(
      checkpoint, weights=checkpoints.from_arrays(arrays)
  )


def test_only_a_tensor_that_is_too_large_is_scaled(tiny, tmp_path):
  # The whole fused tensor has one scale, whichever part of it is large.
  value = tiny.weights['layer_3/attn_v'] * np.float32(50)
  checkpoint = _with(tiny, {'layer_3/attn_v': value})
  gemma_cpp_files.save(tmp_path / 'x.sbs', checkpoint, custom=True)
  tensors = gemma_cpp_files.read_tensors(tmp_path / 'x.sbs')
  scale = tensors['qkv_ein_3'][0].scale
  assert scale == np.float32(np.abs(value).max() / np.float32(1.875)) > 1
  assert {t.scale for n, (t, _) in tensors.items() if n != 'qkv_ein_3'} == {1.0}
  found = _decode(tmp_path / 'x.sbs')['qkv_ein_3']
  assert np.abs(found).max() == np.float32(1.875) * np.float32(scale)
  h = tiny.config.head_dim
  _assert_nearest(found[-h:], value[-1], scale)
  _assert_nearest(found[:h], tiny.weights['layer_3/attn_q'][0], scale)


def test_names_and_shapes_of_1b_are_those_of_gemma_cpp():
  planned = gemma_cpp_tensors.text(model_config.variant('1b'))
  found = {t.name: (t.rows, t.cols, t.type) for t in planned}
  expected = {
      'c_embedding': (262_144, 1152, 'BF16'), 'c_final_norm': (1, 1152, 'F32')
  }
  for i in range(26):
    expected |= {
        f'qkv_ein_{i}': (1536, 1152, 'SFP'), f'att_w_{i}': (1152, 1024, 'SFP'),
        f'gating_ein_{i}': (13_824, 1152, 'SFP'),
        f'linear_w_{i}': (1152, 6912, 'SFP'),
        f'query_norm_{i}': (1, 256, 'F32'), f'key_norm_{i}': (1, 256, 'F32'),
    }
    for norm in ('pre_att_ns', 'post_att_ns', 'pre_ff_ns', 'post_ff_ns'):
      expected[f'{norm}_{i}'] = (1, 1152, 'F32')
  assert found == expected


def test_every_size_has_names_that_fit_and_no_value_is_lost():
  vision = vision_config.VisionConfig(text_dim=5376)
  count = sum(np.prod(s.shape) for s in vision_config.specs(vision).values())
  planned = gemma_cpp_tensors.vision(vision)
  # And the projector's bias, which is zeros.
  assert sum(t.rows * t.cols for t in planned) == count + 5376
  planned += gemma_cpp_tensors.text(model_config.variant('27b'))
  names = [t.name for t in planned]
  assert len(set(names)) == len(names)
  assert max(map(len, names)) <= 16


@pytest.mark.parametrize('change, match', [
    ({}, 'no Gemma 3 of this size'), ({'tokenizer': None}, 'no tokenizer'),
])
def test_what_cannot_be_written_is_refused(tiny, tmp_path, change, match):
  checkpoint = dataclasses.replace(tiny, **change)
  with pytest.raises(errors.UserError, match=match):
    gemma_cpp_files.save(tmp_path / 'x.sbs', checkpoint)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'name', ['embedding', 'layer_2/mlp_up', 'layer_5/attn_q_norm']
)
def test_values_that_are_not_finite_are_named(tiny, tmp_path, name):
  value = tiny.weights[name].copy()
  value.flat[-1] = np.nan
  with pytest.raises(errors.UserError, match=name):
    gemma_cpp_files.save(
        tmp_path / 'x.sbs', _with(tiny, {name: value}), custom=True
    )
  assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_old_file(tiny, tmp_path):
  path = tmp_path / 'x.sbs'
  path.write_bytes(b'old')
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    with pytest.raises(errors.UserError, match='could not be written'):
      gemma_cpp_files.save(path, tiny, custom=True)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert path.read_bytes() == b'old'
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('damage, match', [
    (lambda data, blobs: data[: len(data) // 2], 'damaged'),
    (lambda data, blobs: _overwritten(data, blobs['toc'].offset + 4), 'table'),
    (lambda data, blobs: data.replace(b'toc\0', b'tok\0'), 'no table'),
    (lambda data, blobs: data.replace(b'att_w_3\0', b'att_w_X\0', 1),
     'att_w_X'),
])
def test_a_damaged_file_is_refused(saved, tmp_path, damage, match):
  path, _ = saved
  data, blobs = path.read_bytes(), sbs_blobs.read(path)
  (tmp_path / 'x.sbs').write_bytes(damage(data, blobs))
  with pytest.raises(errors.UserError, match=match):
    gemma_cpp_files.read_tensors(tmp_path / 'x.sbs')


def _overwritten(data, where):
  return data[:where] + b'\xff\xff' + data[where + 2 :]
