"""How does gemma.cpp write down a model's sizes and its table of tensors?

Everything is a sequence of 32-bit words: numbers, truths and enumerations are
one word, a text is its length in words and its bytes, a list its length and
its elements, a record its length in words and its fields. Fields are only
ever appended; a reader gives those that a record ends before their defaults.
Source: gemma.cpp, io/fields.cc, gemma/configs.h and util/mat.h.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from gemma_qat import errors
from gemma_qat.model import config as model_config
from gemma_qat.model import vision as vision_config

# gemma.cpp's enum Type, and the bytes of a value.
TYPES = {'F32': (1, 4), 'BF16': (2, 2), 'SFP': (3, 1)}

# gemma.cpp's enum Model: with a vision tower or, above 1B, without.
_MODELS = {
    ('270m', False): ('Gemma3_270M', 18), ('1b', False): ('Gemma3_1B', 15),
    ('4b', True): ('Gemma3_4B', 14), ('4b', False): ('Gemma3_4B_LM', 20),
    ('12b', True): ('Gemma3_12B', 16), ('12b', False): ('Gemma3_12B_LM', 21),
    ('27b', True): ('Gemma3_27B', 17), ('27b', False): ('Gemma3_27B_LM', 22),
}
# Any sizes, as long as the file says them.
_CUSTOM = ('Custom', 19)

# gemma.cpp's own limit for Gemma 3, whose global layers it tells by it.
_MOST_TOKENS = 32 * 1024
# enum PromptWrapping.
_IT, _PT, _VISION = 0, 1, 2
# What gemma.cpp does not read from the file but does, for every Gemma 3.
_FIXED = {
    'norm_epsilon': 1e-6, 'rope_base_local': 1e4, 'rope_base_global': 1e6
}


class Record(tuple):
  """The fields of a record, in gemma.cpp's order."""


class Tensor(NamedTuple):
  """A line of the table of tensors. scale: decoded values times this."""

  name: str
  type: str
  rows: int
  cols: int
  scale: float

  @property
  def num_bytes(self) -> int:
    return self.rows * self.cols * TYPES[self.type][1]


def model(
    config: model_config.ModelConfig,
    vision: vision_config.VisionConfig | None,
    is_chat: bool,
    custom: bool = False,
) -> Record:
  """Describes a model to gemma.cpp.

  gemma.cpp trusts this more than what it knows of the size, so that the file
  can be right where its tables are not: they leave the global layers' RoPE
  base out for 270M and scale the queries of 27B by the head width.

  Args:
    config: the sizes.
    vision: the tower's sizes, if there is one.
    is_chat: whether prompts are wrapped in turns.
    custom: call it a model of sizes that gemma.cpp has no name for.

  Raises:
    UserError: gemma.cpp has no name for the sizes and `custom` was not
      asked for, or it cannot compute such a model.
  """
  _check(config)
  kind = (model_config.find_variant(config), vision is not None)
  if not custom and kind not in _MODELS:
    raise errors.UserError(
        f'gemma.cpp knows no Gemma 3 of this size ({kind[0]}'
        f'{", with vision" if vision else ""}, {config.num_layers} layers of '
        f'width {config.embed_dim}): it runs 270m, 1b, 4b, 12b and 27b.'
    )
  name, number = _CUSTOM if custom else _MODELS[kind]
  most_tokens = min(config.context_length, _MOST_TOKENS)
  wrapping = _VISION if vision else _IT if is_chat else _PT
  return Record((
      1, name, number, wrapping, TYPES['SFP'][0],
      config.num_layers, config.embed_dim, config.vocab_size, most_tokens,
      0,  # was the number of scales
      0.0, 0.0,  # no caps
      False, False,  # no absolute positions; was local attention
      _query_scale(config),
      [_layer(config)] * config.num_layers,
      [most_tokens if config.is_global(i) else config.sliding_window
       for i in range(config.num_layers)],
      1,  # groups of norms
      _vision(vision),
      1,  # pooling, of a tower's own description only
      1, 106,  # what ends a text, and a turn
      [],  # names of scales, for older files
      True,  # global layers have a RoPE base of their own
  ))


def table(tensors: list[Tensor]) -> np.ndarray:
  """Describes the tensors to gemma.cpp, uint32."""
  parts = []
  for t in tensors:
    number, num_bytes = TYPES[t.type]
    parts.append(words(Record((
        t.name, number, num_bytes, t.rows * t.cols, t.rows, t.cols,
        float(t.scale), t.cols,
    ))))
  return np.concatenate(parts)


def read_table(data: bytes) -> dict[str, Tensor]:
  """Undoes `table`, by name.

  Raises:
    UserError: it is not such a table.
  """
  try:
    values = np.frombuffer(data, '<u4')
    types = {number: (t, size) for t, (number, size) in TYPES.items()}
    found, start = {}, 0
    while start < len(values):
      length, name_length = values[start : start + 2].tolist()
      begin = start + 2 + name_length
      name = values[start + 2 : begin].tobytes().rstrip(b'\0').decode()
      number, size, count, rows, cols, _, stride = (
          values[begin : begin + 7].tolist()
      )
      scale = float(values[begin + 5 : begin + 6].view('<f4')[0])
      if (
          length != name_length + 8 or name in found or stride != cols
          or count != rows * cols or size != types[number][1]
          or not math.isfinite(scale)
      ):
        raise ValueError(name)
      found[name] = Tensor(name, types[number][0], rows, cols, scale)
      start += length + 1
    return found
  except (ValueError, KeyError, IndexError) as error:
    raise errors.UserError(
        'The table of tensors in the .sbs file is damaged: export it again.'
    ) from error


def words(value: Any) -> np.ndarray:
  """Writes a value as words, uint32.

  Args:
    value: a truth, whole number, float, text, list or `Record`.
  """
  if isinstance(value, str):
    data = value.encode()
    data += bytes(-len(data) % 4)
    return np.frombuffer(
        (len(data) // 4).to_bytes(4, 'little') + data, '<u4'
    )
  if isinstance(value, float):
    return np.array([value], '<f4').view('<u4')
  if not isinstance(value, (list, Record)):
    return np.array([value], '<u4')
  parts = [words(v) for v in value]
  count = len(parts)
  if isinstance(value, Record):
    count = sum(len(part) for part in parts)
  return np.concatenate([np.array([count], '<u4'), *parts])


def _layer(c):
  return _layer_record(
      c.embed_dim, c.mlp_dim, c.num_heads, c.num_kv_heads, c.head_dim,
      biases=False, post_norm=True, is_vision=False, head_norms=True,
  )


def _vision(c):
  if c is None:
    return Record((0, 0, 0, 14, 224, [], 1))
  head_dim = c.width // c.num_heads
  layer = _layer_record(
      c.width, c.mlp_dim, c.num_heads, c.num_heads, head_dim,
      biases=True, post_norm=False, is_vision=True, head_norms=False,
  )
  return Record((
      c.width, c.num_positions, 4 * c.num_layers, c.patch_size, c.image_size,
      [layer] * c.num_layers,
      math.isqrt(c.num_positions // c.tokens_per_image),
  ))


def _layer_record(d, f, n, k, h, biases, post_norm, is_vision, head_norms):
  return Record((
      d, 0, f, n, k, h,
      0,  # was the width of a convolution
      biases, False,
      True,  # the gate's matrix is [outputs, inputs]
      int(post_norm), int(is_vision),
      0,  # GELU
      0,  # RoPE over the whole head
      head_norms,
  ))


def _query_scale(c):
  """gemma.cpp's enum QueryScaleType."""
  if c.query_scale_dim == c.head_dim:
    return 0
  if c.query_scale_dim == c.embed_dim // c.num_heads:
    return 1
  raise errors.UserError(
      f'gemma.cpp scales queries by the head width or by width / heads, not '
      f'by {c.query_scale_dim:g}: it cannot run this model.'
  )


def _check(c):
  for field, value in _FIXED.items():
    if getattr(c, field) != value:
      raise errors.UserError(
          f'gemma.cpp computes Gemma 3 with {field} {value:g}, but the '
          f'checkpoint has {getattr(c, field):g}: it cannot run this model.'
      )
  if c.sliding_window >= min(c.context_length, _MOST_TOKENS):
    raise errors.UserError(
        f'gemma.cpp takes a window of {c.sliding_window} tokens for global '
        'attention: it cannot run this model.'
    )
