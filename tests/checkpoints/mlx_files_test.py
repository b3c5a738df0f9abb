"""An MLX folder holds the very codes and scales of a checkpoint."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import mlx_files
from gemma_qat.checkpoints import names
from gemma_qat.checkpoints import random_weights
from gemma_qat.quant import formats


@pytest.fixture(params=['text', 'vision'])
def quantized(request, tiny, mixed):
  vision = None
  if request.param == 'vision':
    vision = random_weights.load('random:tiny+vision:1').vision
  return dataclasses.replace(
      tiny, weights=checkpoints.from_arrays(mixed), vision=vision
  )


@pytest.fixture
def short_scales(tiny, mixed):
  """The same, with scales that bfloat16 holds."""
  tensors = {}
  for name, weight in mixed.items():
    if isinstance(weight, tuple):
      kind, (codes, scale) = weight
      scale = np.asarray(scale).astype(ml_dtypes.bfloat16).astype(np.float32)
      weight = (kind, formats.Quantized(np.asarray(codes), scale))
    tensors[name] = weight
  return dataclasses.replace(tiny, weights=checkpoints.from_arrays(tensors))


def _decode(folder, checkpoint):
  """By-layer name -> float32, by what MLX documents of its layout."""
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  config = json.loads((folder / 'config.json').read_text())
  assert config['quantization'] == config['quantization_config']
  prefix = 'language_model.model.' if checkpoint.vision else 'model.'
  decoded = {}
  for name, file_name in names.huggingface(checkpoint.config, prefix).items():
    path = file_name.removesuffix('.weight')
    word = tensors[file_name]
    if f'{path}.scales' in tensors:
      settings = config['quantization'].get(path, config['quantization'])
      bits, group = settings['bits'], settings['group_size']
      assert settings['mode'] == 'affine'
      word = _affine(
          word, tensors[f'{path}.scales'].astype(np.float32),
          tensors[f'{path}.biases'].astype(np.float32), bits, group,
      )
    decoded[name] = word.astype(np.float32)
  return decoded


def _affine(word, scales, biases, bits, group):
  assert word.dtype == np.uint32
  count = 32 // bits
  columns = word.shape[1] * count
  values = np.empty((len(word), columns), np.float32)
  for i in range(columns):
    q = word[:, i // count] >> np.uint32(bits * (i % count))
    q = (q & np.uint32(2**bits - 1)).astype(np.float32)
    values[:, i] = scales[:, i // group] * q + biases[:, i // group]
  return values


def _same(decoded, checkpoint):
  for name, weight in checkpoint.weights.items():
    expected = checkpoints.to_float32(weight)
    np.testing.assert_array_equal(
        decoded[name].reshape(expected.shape), expected
    )


@pytest.mark.parametrize('scale_dtype', ['auto', 'float32'])
def test_words_decode_to_the_very_weights(quantized, tmp_path, scale_dtype):
  changes = []
  written = mlx_files.save(
      tmp_path / 'x', quantized, scale_dtype,
      lambda name, written, trained: changes.append(
          np.abs(written - trained).max()
      ),
  )
  _same(_decode(tmp_path / 'x', quantized), quantized)
  assert len(changes) == len(quantized.weights) and not any(changes)
  # Their scales are float16 values, few of which bfloat16 holds.
  assert written['F32'] > 0 and 'F16' not in written


def test_bfloat16_scales_are_taken_where_they_are_exact(
    short_scales, tmp_path
):
  written = mlx_files.save(tmp_path / 'x', short_scales)
  _same(_decode(tmp_path / 'x', short_scales), short_scales)
  tensors = safetensors.numpy.load_file(tmp_path / 'x/model.safetensors')
  assert tensors['model.layers.0.mlp.up_proj.scales'].dtype == (
      ml_dtypes.bfloat16
  )
  # MLX rounds looked up rows to the type of these.
  assert tensors['model.embed_tokens.scales'].dtype == np.float32
  matrices = sum(
      int(np.prod(e.shape))
      for n, e in short_scales.weights.entries.items() if e.format == 'q4_0'
  )
  assert 8 * written['BF16'] == matrices  # One bit a weight: 5 in all.


def test_forced_bfloat16_scales_are_rounded_and_told(quantized, tmp_path):
  changes = {}

  def on_piece(name, written, trained):
    changes[name] = (written, trained)

  mlx_files.save(tmp_path / 'x', quantized, 'bfloat16', on_piece)
  decoded = _decode(tmp_path / 'x', quantized)
  for name, (written, trained) in changes.items():
    weight = quantized.weights[name]
    np.testing.assert_array_equal(trained, checkpoints.to_float32(weight))
    np.testing.assert_array_equal(written, decoded[name].reshape(written.shape))
    if isinstance(weight, checkpoints.Stored):
      assert 0 < np.abs(written - trained).max() < np.abs(trained).max() / 100


def test_per_channel_codes_fit_but_for_the_last_bits(tiny, mixed, tmp_path):
  per_channel = {
      name: ('int4', formats.get('int4').quantize(
          tiny.weights[name], 2 if name.endswith('attn_o') else 1
      )) if '/' in name and isinstance(weight, tuple) else weight
      for name, weight in mixed.items()
  }
  whole = dataclasses.replace(
      tiny, weights=checkpoints.from_arrays(per_channel)
  )
  told = {}
  mlx_files.save(
      tmp_path / 'x', whole,
      on_piece=lambda name, written, trained: told.update({name: written}),
  )
  decoded = _decode(tmp_path / 'x', whole)
  for name, written in told.items():
    np.testing.assert_array_equal(decoded[name].reshape(written.shape), written)
    # Of a float32 scale times a code and the bias, each rounded.
    trained = checkpoints.to_float32(whole.weights[name])
    largest = np.abs(trained).max()
    np.testing.assert_allclose(written, trained, rtol=0, atol=1e-6 * largest)


def test_floats_go_in_as_they_are(tiny, mixed, tmp_path):
  name = 'layer_2/mlp_up'
  arrays = dict(mixed) | {name: tiny.weights[name].astype(ml_dtypes.bfloat16)}
  some = dataclasses.replace(tiny, weights=checkpoints.from_arrays(arrays))
  mlx_files.save(tmp_path / 'x', some)
  tensors = safetensors.numpy.load_file(tmp_path / 'x/model.safetensors')
  path = 'model.layers.2.mlp.up_proj'
  assert tensors[f'{path}.weight'].dtype == ml_dtypes.bfloat16
  assert f'{path}.scales' not in tensors
  assert tensors['model.norm.weight'].dtype == np.float32
  _same(_decode(tmp_path / 'x', some), some)


def test_the_embedding_has_eight_bits_and_the_rest_four(quantized, tmp_path):
  mlx_files.save(tmp_path / 'x', quantized)
  config = json.loads((tmp_path / 'x/config.json').read_text())
  is_seeing = quantized.vision is not None
  prefix = 'language_model.' if is_seeing else ''
  assert config['quantization'] == {
      'group_size': 32, 'bits': 4, 'mode': 'affine',
      f'{prefix}model.embed_tokens': {
          'group_size': 32, 'bits': 8, 'mode': 'affine'
      },
  }
  assert config['model_type'] == ('gemma3' if is_seeing else 'gemma3_text')
  # What mlx-lm builds its embedding from.
  assert config['vocab_size'] == 512
  assert 'rope_theta' in config.get('text_config', config)


def test_nothing_quantized_and_unknown_scales_are_refused(
    tiny, quantized, tmp_path
):
  with pytest.raises(errors.UserError, match='quantize it first'):
    mlx_files.save(tmp_path / 'x', tiny)
  with pytest.raises(errors.UserError, match='float16.*bfloat16'):
    mlx_files.save(tmp_path / 'x', quantized, 'float16')
  assert not list(tmp_path.iterdir())


def test_mlx_dequantizes_to_the_very_weights(quantized, tmp_path):
  mx = pytest.importorskip('mlx.core')
  mlx_files.save(tmp_path / 'x', quantized)
  tensors = mx.load(str(tmp_path / 'x/model.safetensors'))
  prefix = 'language_model.model.' if quantized.vision else 'model.'
  path = f'{prefix}layers.3.self_attn.o_proj'
  values = mx.dequantize(
      tensors[f'{path}.weight'], tensors[f'{path}.scales'],
      tensors[f'{path}.biases'], group_size=32, bits=4,
  )
  expected = checkpoints.to_float32(quantized.weights['layer_3/attn_o'])
  np.testing.assert_array_equal(
      np.array(values).reshape(expected.shape), expected
  )
