"""A folder for transformers or vLLM holds the very weights of a checkpoint."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import huggingface
from gemma_qat.checkpoints import huggingface_json
from gemma_qat.checkpoints import huggingface_config
from gemma_qat.checkpoints import huggingface_out
from gemma_qat.checkpoints import names
from gemma_qat.checkpoints import random_weights
from gemma_qat.model import config as model_config
from gemma_qat.model import weights as model_weights

_FLOATS = {
    'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16,
    'float16': np.float16,
}


@pytest.fixture
def seeing(tiny):
  return dataclasses.replace(
      tiny, vision=random_weights.load('random:tiny+vision:1').vision
  )


@pytest.fixture(params=['text', 'vision'])
def quantized(request, tiny, seeing, mixed):
  base = tiny if request.param == 'text' else seeing
  return dataclasses.replace(base, weights=checkpoints.from_arrays(mixed))


def _read(folder):
  tensors = {}
  for path in folder.glob('*.safetensors'):
    tensors |= safetensors.numpy.load_file(path)
  return tensors


def _config(folder):
  return json.loads((folder / 'config.json').read_text())


def _prefix(checkpoint):
  return 'language_model.model.' if checkpoint.vision else 'model.'


def _changed(checkpoint, **changes):
  arrays = dict(checkpoint.weights) | changes
  return dataclasses.replace(
      checkpoint, weights=checkpoints.from_arrays(arrays)
  )


def test_float32_comes_back_bit_for_bit(tiny, tmp_path):
  huggingface_out.save(tmp_path / 'x', tiny, 'float32')
  loaded = huggingface.load(tmp_path / 'x')
  assert loaded.config == tiny.config
  for name, expected in tiny.weights.items():
    np.testing.assert_array_equal(loaded.weights[name], expected)
  assert loaded.tokenizer.digest == tiny.tokenizer.digest


@pytest.mark.parametrize('dtype', _FLOATS)
def test_each_weight_is_rounded_to_nearest_and_both_are_told(
    tiny, tmp_path, dtype
):
  told = {}

  def on_piece(name, written, trained):
    told.setdefault(name, []).append((written, trained))

  written = huggingface_out.save(tmp_path / 'x', tiny, dtype, on_piece)
  loaded = huggingface.load(tmp_path / 'x')
  for name, weight in tiny.weights.items():
    rounded = weight.astype(_FLOATS[dtype]).astype(np.float32)
    np.testing.assert_array_equal(loaded.weights[name], rounded)
    pieces = [np.concatenate(side) for side in zip(*told[name])]
    np.testing.assert_array_equal(pieces[0], rounded)
    np.testing.assert_array_equal(pieces[1], weight)
  assert list(told) == list(tiny.weights)
  size = sum(w.size for w in tiny.weights.values())
  assert list(written.values()) == [size * np.dtype(_FLOATS[dtype]).itemsize]


def test_quantized_weights_are_written_as_their_values(quantized, tmp_path):
  huggingface_out.save(tmp_path / 'x', quantized, 'float32')
  specs = model_weights.by_layer_specs(quantized.config)
  tensors = _read(tmp_path / 'x')
  file_names = names.huggingface(quantized.config, _prefix(quantized))
  for name, file_name in file_names.items():
    expected = checkpoints.to_float32(quantized.weights[name])
    np.testing.assert_array_equal(
        tensors[file_name], expected.reshape(names.file_shape(specs[name]))
    )


def test_matrices_lie_as_outputs_by_inputs(tiny, tmp_path):
  huggingface_out.save(tmp_path / 'x', tiny, 'float32')
  tensors = _read(tmp_path / 'x')
  q = tensors['model.layers.2.self_attn.q_proj.weight']
  assert q.shape == (4 * 32, 64)
  np.testing.assert_array_equal(
      q, tiny.weights['layer_2/attn_q'].reshape(q.shape)
  )
  assert tensors['model.layers.2.self_attn.o_proj.weight'].shape == (64, 4 * 32)
  assert set(tensors) == set(names.huggingface(tiny.config).values())


def test_shards_are_read_as_one_model(tiny, tmp_path):
  huggingface_out.save(tmp_path / 'x', tiny, 'float32', shard_bytes=200_000)
  shards = list((tmp_path / 'x').glob('model-*.safetensors'))
  assert len(shards) > 5
  assert max(p.stat().st_size for p in shards) < 210_000
  loaded = huggingface.load(tmp_path / 'x')
  for name, expected in tiny.weights.items():
    np.testing.assert_array_equal(loaded.weights[name], expected)


@pytest.mark.parametrize('save', [
    huggingface_out.save, huggingface_out.save_w4a16
])
def test_the_vision_tower_goes_along_byte_for_byte(
    seeing, mixed, tmp_path, save
):
  both = dataclasses.replace(seeing, weights=checkpoints.from_arrays(mixed))
  save(tmp_path / 'x', both)
  tensors = _read(tmp_path / 'x')
  for name, n in names.vision(both.vision.config).items():
    expected = both.vision.weights[name]
    assert tensors[n.huggingface].dtype == expected.dtype == ml_dtypes.bfloat16
    assert tensors[n.huggingface].shape == expected.shape
    assert tensors[n.huggingface].tobytes() == expected.tobytes()
  config = _config(tmp_path / 'x')
  assert config['architectures'] == ['Gemma3ForConditionalGeneration']
  assert config['vision_config']['intermediate_size'] == 72
  assert config['mm_tokens_per_image'] == 4
  processor = json.loads((tmp_path / 'x/preprocessor_config.json').read_text())
  assert processor['size'] == {'height': 112, 'width': 112}
  assert processor['image_seq_length'] == 4


def test_a_folder_with_vision_is_read_and_written_again(seeing, tmp_path):
  huggingface_out.save(tmp_path / 'x', seeing, 'float32')
  loaded = huggingface.load(tmp_path / 'x')
  assert loaded.config == seeing.config
  assert loaded.vision.config == seeing.vision.config
  assert loaded.tokenizer.digest == seeing.tokenizer.digest
  huggingface_out.save(tmp_path / 'y', loaded, 'float32')
  for first in (tmp_path / 'x').iterdir():
    assert (tmp_path / 'y' / first.name).read_bytes() == first.read_bytes()


def test_gemmas_vocabulary_is_padded_for_the_image_token(seeing, tmp_path):
  config = dataclasses.replace(
      seeing.config, num_layers=1, embed_dim=32, vocab_size=names.VOCABULARY
  )
  weights = {
      name: np.ones(spec.shape, np.float32)
      for name, spec in model_weights.by_layer_specs(config).items()
  }
  padded = dataclasses.replace(
      seeing, config=config, weights=checkpoints.from_arrays(weights),
      tokenizer=None,
  )
  huggingface_out.save(tmp_path / 'x', padded, 'bfloat16')
  table = _read(tmp_path / 'x')['language_model.model.embed_tokens.weight']
  assert table.shape == (262_208, 32)
  assert (table[: names.VOCABULARY] == 1).all()
  assert not table[names.VOCABULARY :].any()
  written = _config(tmp_path / 'x')
  assert written['text_config']['vocab_size'] == 262_208
  assert (
      written['boi_token_index'], written['eoi_token_index'],
      written['image_token_index'],
  ) == (255_999, 256_000, 262_144)
  # A text model has no image token.
  huggingface_out.save(
      tmp_path / 'y', dataclasses.replace(padded, vision=None), 'bfloat16'
  )
  table = _read(tmp_path / 'y')['model.embed_tokens.weight']
  assert table.shape == (262_144, 32)


@pytest.mark.parametrize('scale_dtype', ['auto', 'float32', 'float16'])
def test_int4_words_decode_to_the_codes_and_scales(
    quantized, tmp_path, scale_dtype
):
  changes = []
  huggingface_out.save_w4a16(
      tmp_path / 'x', quantized, scale_dtype,
      on_piece=lambda name, written, trained: changes.append(
          np.abs(written - trained).max()
      ),
  )
  assert not any(changes)
  tensors = _read(tmp_path / 'x')
  seen_negative = False
  file_names = names.huggingface(quantized.config, _prefix(quantized))
  for name, file_name in file_names.items():
    path = file_name.removesuffix('.weight')
    weight = checkpoints.to_float32(quantized.weights[name])
    if '/' not in name or weight.ndim == 1:
      found = tensors[file_name]
    else:
      rows, columns = tensors[f'{path}.weight_shape']
      word = tensors[f'{path}.weight_packed']
      assert word.dtype == np.int32 and word.shape == (rows, columns // 8)
      scale = tensors[f'{path}.weight_scale'].astype(np.float32)
      seen_negative |= bool((scale < 0).any())
      found = np.empty((rows, columns), np.float32)
      for i in range(columns):
        code = (word[:, i // 8] >> (4 * (i % 8)) & 15) - 8
        found[:, i] = code * scale[:, i // 32]
    np.testing.assert_array_equal(found.reshape(weight.shape), weight)
  assert seen_negative


def test_int4_scales_are_bfloat16_where_that_is_exact(
    tiny, mixed, tmp_path
):
  rounded = {}
  for name, weight in mixed.items():
    if isinstance(weight, tuple):
      kind, (codes, scale) = weight
      scale = np.asarray(scale).astype(ml_dtypes.bfloat16).astype(np.float32)
      weight = (kind, type(weight[1])(codes, scale))
    rounded[name] = weight
  for folder, tensors, kind in (
      ('x', mixed, np.float16), ('y', rounded, ml_dtypes.bfloat16)
  ):
    huggingface_out.save_w4a16(
        tmp_path / folder,
        dataclasses.replace(tiny, weights=checkpoints.from_arrays(tensors)),
        dtype='bfloat16',
    )
    written = _read(tmp_path / folder)
    assert written['model.layers.0.mlp.up_proj.weight_scale'].dtype == kind
    # Readers turn scales into this type: bfloat16 would round those of x.
    assert _config(tmp_path / folder)['dtype'] == (
        'float32' if folder == 'x' else 'bfloat16'
    )


def test_int4_names_the_first_matrix_that_is_not_q4_0(tiny, mixed, tmp_path):
  float_up = dict(mixed) | {'layer_5/mlp_up': tiny.weights['layer_5/mlp_up']}
  wrong = dataclasses.replace(
      tiny, weights=checkpoints.from_arrays(float_up)
  )
  with pytest.raises(errors.UserError, match='layer_5/mlp_up is float32'):
    huggingface_out.save_w4a16(tmp_path / 'x', wrong)
  assert not list(tmp_path.iterdir())


def test_small_files_go_from_folder_to_folder(seeing, tmp_path):
  extras = {
      'generation_config.json': b'{"top_k":  7}',
      'preprocessor_config.json': b'{"size": 3}',
      'config.json': b'not this one',
  }
  for folder, checkpoint in (
      ('x', seeing), ('y', dataclasses.replace(seeing, vision=None))
  ):
    huggingface_out.save(
        tmp_path / folder, dataclasses.replace(checkpoint, extras=extras)
    )
    path = tmp_path / folder
    assert (path / 'generation_config.json').read_bytes() == b'{"top_k":  7}'
    assert _config(path)['dtype'] == 'bfloat16'
  preprocessor = 'x/preprocessor_config.json'
  assert (tmp_path / preprocessor).read_bytes() == b'{"size": 3}'
  assert not (tmp_path / 'y/preprocessor_config.json').exists()


def test_chat_models_end_their_turn_or_the_text(tiny, tmp_path):
  tokenizer = tiny.tokenizer
  for folder, end, expected in (
      ('x', tokenizer.eos_id, 1), ('y', tokenizer.end_of_turn_id, [1, 5])
  ):
    chat = dataclasses.replace(tokenizer, eos_id=end)
    huggingface_out.save(
        tmp_path / folder, dataclasses.replace(tiny, tokenizer=chat)
    )
    path = tmp_path / folder / 'generation_config.json'
    generation = json.loads(path.read_text())
    assert generation['eos_token_id'] == expected
    assert generation.get('top_k') == (64 if folder == 'y' else None)
    assert huggingface.load(tmp_path / folder).tokenizer.eos_id == end


@pytest.mark.parametrize(
    'said', [b'[' * 100_000, b'9' * 5_000, b'[7]', b'\xff']
)
def test_a_generation_config_that_says_nothing_is_left_out(tiny, said):
  damaged = dataclasses.replace(tiny, extras={'generation_config.json': said})
  assert not huggingface_json.sampling(damaged)


def test_nan_and_overflow_are_refused_by_name(tiny, tmp_path):
  for dtype, value in (('float32', np.nan), ('float16', 1e5)):
    wrong = _changed(
        tiny, **{'layer_3/mlp_down': np.full((64, 128), value, np.float32)}
    )
    with pytest.raises(errors.UserError, match='layer_3/mlp_down'):
      huggingface_out.save(tmp_path / 'x', wrong, dtype)
  assert not list(tmp_path.iterdir())


def test_too_small_a_disk_is_found_out_before_anything_is_written(
    tiny, tmp_path
):
  rows = 2**40
  entries = tiny.weights.entries
  entries['embedding'] = entries['embedding']._replace(shape=(rows, 64))
  huge = dataclasses.replace(
      tiny, config=dataclasses.replace(tiny.config, vocab_size=rows),
      weights=checkpoints.Weights(entries),
  )
  with pytest.raises(errors.UserError, match='GB are free'):
    huggingface_out.save(tmp_path / 'x', huge)
  assert not list(tmp_path.iterdir())


def test_unknown_dtypes_are_refused(tiny, tmp_path):
  with pytest.raises(errors.UserError, match='float64.*bfloat16'):
    huggingface_out.save(tmp_path / 'x', tiny, 'float64')


def test_an_existing_folder_is_never_overwritten(tiny, tmp_path):
  (tmp_path / 'x').mkdir()
  (tmp_path / 'x/mine').write_text('mine')
  with pytest.raises(errors.UserError, match='exists already'):
    huggingface_out.save(tmp_path / 'x', tiny)
  assert [p.name for p in (tmp_path / 'x').iterdir()] == ['mine']


def test_a_failed_save_leaves_nothing(tiny, tmp_path):
  wrong = _changed(tiny, **{'layer_7/mlp_up': np.zeros((3, 3), np.float32)})
  with pytest.raises(errors.UserError, match='layer_7/mlp_up'):
    huggingface_out.save(tmp_path / 'x', wrong)
  assert not list(tmp_path.iterdir())


def test_transformers_loads_the_folder(tiny, tmp_path):
  transformers = pytest.importorskip('transformers')
  pytest.importorskip('torch')
  for variant in model_config.VARIANTS:
    # It checks the types of all values.
    transformers.Gemma3TextConfig(**huggingface_config.write(
        model_config.variant(variant), 'bfloat16', {}
    ))
  huggingface_out.save(tmp_path / 'x', tiny, 'float32')
  model = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / 'x')
  loaded = model.state_dict()['model.layers.3.mlp.down_proj.weight']
  np.testing.assert_array_equal(
      loaded.numpy(), tiny.weights['layer_3/mlp_down']
  )
