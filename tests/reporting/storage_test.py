"""Counted weights are those of exported files and published models."""

import gguf
import numpy as np
import pytest
import safetensors.numpy

from gemma_qat import errors
from gemma_qat.checkpoints import detect
from gemma_qat.commands import quantize
from gemma_qat.model import config as model_config
from gemma_qat.model import weights as model_weights
from gemma_qat.reporting import storage
from gemma_qat.reporting import vision_tower

TINY = model_config.variant('tiny')


@pytest.mark.parametrize('layout, embedding', [
    ('q4_0', 'q8_0'), ('q4_0', 'q4_0'), ('q4_0', 'f16'), ('q8_0', 'q8_0'),
    ('f16', 'f16'),
])
def test_a_gguf_holds_exactly_the_counted_bytes(tmp_path, layout, embedding):
  file = tmp_path / 'x.gguf'
  quantize.quantize('random:tiny', file, layout, embedding)
  found = storage.weights(TINY, layout, embedding)
  sizes = {'matrices': 0, 'embedding': 0, 'norms': 0}
  for name, entry in detect.load(file).weights.entries.items():
    part = 'embedding' if name == 'embedding' else (
        'matrices' if len(entry.shape) > 1 else 'norms'
    )
    sizes[part] += entry.num_bytes
  assert sizes == {
      'matrices': found.matrices, 'embedding': found.embedding,
      'norms': found.norms,
  }
  # And as another reader sees them.
  tensors = gguf.GGUFReader(file).tensors
  assert found.tensors == sum(int(t.n_bytes) for t in tensors)


def test_header_is_the_vocabularys_and_only_in_gguf():
  large = model_config.variant('27b')
  assert 6e6 < storage.weights(large, 'q4_0').header < 7e6
  assert storage.weights(large, 'bf16').header == 0


@pytest.mark.parametrize('size, matrices, embedding', [
    # Source: the Gemma 3 report, table 1 (millions).
    ('1b', 698, 302), ('4b', 3209, 675), ('12b', 10_759, 1012),
    ('27b', 25_600, 1416),
])
def test_counts_are_those_of_the_report(size, matrices, embedding):
  counts = storage.weight_counts(model_config.variant(size))
  held = counts['matrices'] + counts['norms']
  assert held / 1e6 == pytest.approx(matrices, abs=0.6)
  # From 4B on the report has 0.5 % more than 262,144 rows take.
  assert counts['embedding'] / 1e6 == pytest.approx(embedding, rel=0.007)


def test_the_towers_weights_are_the_417_million_of_the_report():
  for size in ('4b', '12b', '27b'):
    config = model_config.variant(size)
    assert round(vision_tower.tower_weights(config) / 1e6) == 417
    assert vision_tower.folder_bytes(config) == 2 * (
        vision_tower.tower_weights(config) + 1152 * (config.embed_dim + 1)
    )
    # Two bytes a weight and a little: patches, positions, vectors in float32.
    assert vision_tower.mmproj_bytes(config) == pytest.approx(
        vision_tower.folder_bytes(config), rel=0.02
    )
  small = model_config.variant('1b')
  assert not vision_tower.has_vision(small)
  assert vision_tower.mmproj_bytes(small) == 0


@pytest.mark.parametrize('layout, codes, scale, extra', [
    ('w4a16', np.int32, 2, 1), ('mlx', np.uint32, 2, 2),
    ('mlx_f32', np.uint32, 4, 2),
])
def test_a_matrix_takes_its_codes_and_scales(
    tmp_path, layout, codes, scale, extra
):
  """Arrays as these layouts hold them, written and measured."""
  matrix = np.zeros((128, 64 // 8), codes)
  dtype = {2: np.float16, 4: np.float32}[scale]
  arrays = {'packed': matrix}
  for i in range(extra):
    arrays[f'scale{i}'] = np.zeros((128, 64 // 32), dtype)
  if layout == 'w4a16':
    arrays['shape'] = np.zeros(2, np.int64)
  safetensors.numpy.save_file(arrays, tmp_path / 'x')
  stored = safetensors.numpy.load_file(tmp_path / 'x')
  spec = model_weights.layer_specs(TINY)['mlp_up']
  found = storage.layout(layout)
  assert storage.TYPES[found.matrices].size(spec) + found.matrix_bytes == sum(
      a.nbytes for a in stored.values()
  )


def test_int4_has_one_scale_for_every_output_channel():
  specs = model_weights.layer_specs(TINY)
  size = storage.TYPES['int4'].size
  assert size(specs['mlp_down']) == 64 * 128 // 2 + 4 * 64
  # Both contracted axes share it.
  assert size(specs['attn_o']) == 64 * 4 * 32 // 2 + 4 * 64


def test_fewer_bits_take_less():
  for size in ('270m', '27b'):
    config = model_config.variant(size)
    order = [
        storage.weights(config, *x).tensors for x in (
            ('bf16',), ('q8_0', 'q8_0'), ('q4_0', 'q8_0'), ('q4_0', 'q6_k'),
            ('q4_0', 'q4_0'), ('int4',)
        ) if len(x) == 1 or storage.has_whole_blocks(config, x[1])
    ]
    assert order == sorted(order, reverse=True)
    assert len(order) == (6 if size == '27b' else 5)


@pytest.mark.parametrize('size', ['270m', '1b'])
def test_q6_k_needs_a_width_of_whole_blocks(size):
  with pytest.raises(errors.UserError, match='256 weights.*choose q8_0'):
    storage.weights(model_config.variant(size), 'q4_0', 'q6_k')


def test_unknown_layouts_and_embeddings_are_named():
  with pytest.raises(errors.UserError, match="'q9'.*q4_0"):
    storage.weights(TINY, 'q9')
  with pytest.raises(errors.UserError, match="w4a16.*'q4_0'.*bf16"):
    storage.weights(TINY, 'w4a16', 'q4_0')
