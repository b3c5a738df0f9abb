"""Sizes and tables are written word for word as gemma.cpp reads them."""

import dataclasses
import struct

import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import gemma_cpp_fields as fields
from gemma_qat.model import config as model_config
from gemma_qat.model import vision as vision_config


def test_each_kind_of_value_has_its_words():
  one = struct.unpack('<I', struct.pack('<f', 1.5))[0]
  record = fields.Record((7, True, 1.5, 'abcde', [1, 2], fields.Record((9,))))
  letters = [int.from_bytes(b'abcd', 'little'), ord('e')]
  np.testing.assert_array_equal(
      fields.words(record), [11, 7, 1, one, 2, *letters, 2, 1, 2, 1, 9]
  )
  np.testing.assert_array_equal(fields.words(''), [0])
  np.testing.assert_array_equal(fields.words([]), [0])
  assert fields.words(record).dtype == np.uint32


def test_the_sizes_of_1b_are_those_of_gemma_cpp():
  words = fields.words(
      fields.model(model_config.variant('1b'), None, True)
  ).tolist()
  name = [int.from_bytes(b'Gemm', 'little'), int.from_bytes(b'a3_1', 'little'),
          ord('B')]
  # Family, name, Model, IT wrapping, SFP, layers, width, tokens, context.
  expected = [1, 3, *name, 15, 0, 3, 26, 1152, 262_144, 32_768]
  assert words[0] == len(words) - 1
  assert words[1 : 1 + len(expected)] == expected
  # No scales, no caps, no absolute positions, query scale by head width; then
  # the layers: a count and records of 15 words.
  rest = words[1 + len(expected) :]
  layer = [15, 1152, 0, 6912, 4, 1, 256, 0, 0, 0, 1, 1, 0, 0, 0, 1]
  assert rest[:7] == [0, 0, 0, 0, 0, 0, 26]
  assert rest[7 : 7 + 26 * 16] == layer * 26
  windows = [512, 512, 512, 512, 512, 32_768] * 4 + [512, 512]
  assert rest[7 + 26 * 16 :] == [
      26, *windows, 1,
      7, 0, 0, 0, 14, 224, 0, 1,  # no tower
      1, 1, 106, 0, 1,
  ]


def test_the_tower_of_4b_is_that_of_gemma_cpp():
  config = model_config.variant('4b')
  vision = vision_config.VisionConfig(text_dim=2560)
  words = fields.words(fields.model(config, vision, False)).tolist()
  layer = [15, 1152, 0, 4304, 16, 16, 72, 0, 1, 0, 1, 0, 1, 0, 0, 0]
  tower = [1152, 4096, 108, 14, 896, 27, *layer * 27, 4]
  assert words[-len(tower) - 6 :] == [len(tower), *tower, 1, 1, 106, 0, 1]
  # Model and wrapping, behind family and a name of three words.
  assert words[6:8] == [14, 2]


def test_only_27b_scales_its_queries_by_width_over_heads():
  for name, expected in (('12b', 0), ('27b', 1)):
    config = model_config.variant(name)
    words = fields.words(fields.model(config, None, False)).tolist()
    # Behind 16 words of numbers and the name of four words.
    assert words[words.index(config.num_layers) + 9] == expected


@pytest.mark.parametrize('change, match', [
    ({'num_layers': 7}, 'no Gemma 3 of this size'),
    ({'norm_epsilon': 1e-5}, 'norm_epsilon'),
    ({'rope_base_global': 1e4}, 'rope_base_global'),
    ({'query_scale_dim': 100.0}, 'queries'),
    ({'sliding_window': 32_768}, 'window'),
])
def test_what_gemma_cpp_cannot_run_is_refused(change, match):
  config = dataclasses.replace(model_config.variant('1b'), **change)
  with pytest.raises(errors.UserError, match=match):
    fields.model(config, None, False)


def test_a_table_comes_back():
  tensors = [
      fields.Tensor('c_embedding', 'BF16', 512, 64, 1.0),
      fields.Tensor('linear_w_61', 'SFP', 64, 128, 1.25),
      fields.Tensor('norm', 'F32', 1, 64, 1.0),
  ]
  data = fields.table(tensors)
  # 11 letters are 3 words; then type, bytes, values, rows, cols, scale, cols.
  one = struct.unpack('<I', struct.pack('<f', 1.0))[0]
  assert data[:5].tolist()[:2] == [11, 3]
  assert data[5:12].tolist() == [2, 2, 32_768, 512, 64, one, 64]
  found = fields.read_table(data.tobytes())
  assert list(found.values()) == tensors


@pytest.mark.parametrize('where, value', [
    (0, 12), (0, 0), (1, 9), (5, 9), (6, 4), (7, 1), (11, 65), (12, 1),
])
def test_a_damaged_table_is_refused(where, value):
  tensors = [fields.Tensor(n, 'BF16', 512, 64, 1.0)
             for n in ('c_embedding', 'd_embedding')]
  data = fields.table(tensors)
  data[where] = value
  with pytest.raises(errors.UserError, match='damaged'):
    fields.read_table(data.tobytes())
  with pytest.raises(errors.UserError, match='damaged'):
    fields.read_table(fields.table(tensors).tobytes()[:-3])
