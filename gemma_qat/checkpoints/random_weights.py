"""Which model stands in where no checkpoint is at hand?"""

import dataclasses
import functools
import zlib

import ml_dtypes
import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.model import config as model_config
from gemma_qat.model import vision as vision_config
from gemma_qat.model import weights as model_weights

_PREFIX = 'random:'
_NORM_SPREAD = 0.1
# Values that are drawn together: reading a few rows should not draw them all.
_BLOCK = 2**22


def is_name(name: str) -> bool:
  """Whether a name means random weights."""
  return name.startswith(_PREFIX)


def load(name: str) -> checkpoints.Checkpoint:
  """Makes the checkpoint of 'random:VARIANT[+vision][:SEED]'.

  Matrices are normal with standard deviation 1 / sqrt(row length), gains
  about 1. A weight depends on seed and name alone: reading it again gives the
  same numbers. `tiny` comes with the tiny tokenizer, the others with none;
  '+vision' adds a tower of bfloat16 values, a small one beside `tiny`.

  Raises:
    UserError: unknown variant, or a seed that is no number.
  """
  variant, _, seed = name.removeprefix(_PREFIX).partition(':')
  if seed and not seed.isdecimal():
    raise errors.UserError(
        f'{name!r} has the seed {seed!r}: give a whole number, as in '
        'random:tiny:1.'
    )
  variant, plus, extra = variant.partition('+')
  if plus and extra != 'vision':
    raise errors.UserError(
        f'{name!r} adds {extra!r}: only vision can be added, as in '
        'random:tiny+vision.'
    )
  config = model_config.variant(variant)
  is_tiny = variant == 'tiny'
  checkpoint = make(
      config, _tower(config, is_tiny) if plus else None,
      tokenizers.tiny_tokenizer(config.vocab_size) if is_tiny else None,
      int(seed or 0),
  )
  return dataclasses.replace(checkpoint, source=name)


def make(
    config: model_config.ModelConfig,
    vision: vision_config.VisionConfig | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
    seed: int = 0,
) -> checkpoints.Checkpoint:
  """Makes a checkpoint of any sizes; see `load`.

  Args:
    config: of the text model.
    vision: of a tower, None for none.
    tokenizer: of as many tokens as `config` has, or None.
    seed: another one gives other weights.
  """
  draw = functools.partial(_draw, seed)
  tower = vision and checkpoints.Vision(
      vision, _weights(vision_config.specs(vision), ml_dtypes.bfloat16, draw)
  )
  return checkpoints.Checkpoint(
      config=config,
      weights=_weights(model_weights.by_layer_specs(config), np.float32, draw),
      tokenizer=tokenizer,
      metadata={'seed': seed},
      source=f'{_PREFIX}{config.variant}',
      layout='random',
      vision=tower,
  )


def _tower(config, is_tiny):
  if not is_tiny:
    return vision_config.VisionConfig(text_dim=config.embed_dim)
  # As odd as the real one: an MLP width that no block of 32 divides.
  return vision_config.VisionConfig(
      text_dim=config.embed_dim, image_size=112, width=32, mlp_dim=72,
      num_layers=2, num_heads=2, tokens_per_image=4,
  )


def _weights(specs, dtype, draw):
  return checkpoints.Weights({
      name: checkpoints.Entry(
          np.dtype(dtype).name, None, spec.shape,
          np.dtype(dtype).itemsize * int(np.prod(spec.shape)),
          functools.partial(draw, name, spec, dtype),
      )
      for name, spec in specs.items()
  })


def _draw(seed, name, spec, dtype, rows):
  """Draws rows; each block of rows from a stream of its own."""
  row = int(np.prod(spec.shape[1:], dtype=np.int64))
  step = max(1, _BLOCK // row)
  start, stop, _ = rows.indices(spec.shape[0])
  key = [seed, zlib.crc32(name.encode())]
  is_gain = len(spec.shape) == 1
  spread = np.float32(_NORM_SPREAD if is_gain else spec.row_length**-0.5)
  if not is_gain and not spec.contraction:
    spread = np.float32(row**-0.5)
  blocks = []
  for block in range(start // step, -(-stop // step)):
    first = block * step
    count = min(step, spec.shape[0] - first)
    generator = np.random.default_rng(key + [block] if block else key)
    values = generator.standard_normal((count, *spec.shape[1:]), np.float32)
    values *= spread
    blocks.append(values[max(0, start - first) : stop - first].astype(dtype))
  return np.concatenate(blocks)
