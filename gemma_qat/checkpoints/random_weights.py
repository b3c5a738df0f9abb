"""Which model stands in where no checkpoint is at hand?"""

import functools
import zlib

import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import names
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.model import config as model_config
from gemma_qat.model import weights as model_weights

_PREFIX = 'random:'
_NORM_SPREAD = 0.1


def is_name(name: str) -> bool:
  """Whether a name means random weights."""
  return name.startswith(_PREFIX)


def load(name: str) -> checkpoints.Checkpoint:
  """Makes the checkpoint of 'random:VARIANT' or 'random:VARIANT:SEED'.

  Matrices are normal with standard deviation 1 / sqrt(row length), gains
  about 1. A weight depends on seed and name alone: reading it again gives the
  same numbers. `tiny` comes with the tiny tokenizer, the others with none.

  Raises:
    UserError: unknown variant, or a seed that is no number.
  """
  variant, _, seed = name.removeprefix(_PREFIX).partition(':')
  if seed and not seed.isdecimal():
    raise errors.UserError(
        f'{name!r} has the seed {seed!r}: give a whole number, as in '
        'random:tiny:1.'
    )
  config = model_config.variant(variant)
  entries = {}
  for weight, spec in model_weights.by_layer_specs(config).items():
    entries[weight] = checkpoints.Entry(
        'random', None, spec.shape, 4 * int(np.prod(spec.shape)),
        functools.partial(_draw, int(seed or 0), weight, spec),
    )
  is_tiny = variant == 'tiny'
  return checkpoints.Checkpoint(
      config=config,
      weights=checkpoints.Weights(entries),
      tokenizer=(
          tokenizers.tiny_tokenizer(config.vocab_size) if is_tiny else None
      ),
      metadata={'seed': int(seed or 0)},
      source=name,
      layout='random',
  )


def _draw(seed, name, spec):
  generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
  spread = _NORM_SPREAD if names.is_norm(spec) else spec.row_length**-0.5
  values = generator.standard_normal(spec.shape, np.float32)
  return values * np.float32(spread)
