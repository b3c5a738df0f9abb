"""What do the memory figures of the Gemma 3 report count?

The report ("Memory footprints in GB", weights and weights with the KV cache of
32,768 tokens "quantized in 8 bits") does not say. Each `RECIPES` entry is
arithmetic that gives all its figures, found by trying: for each column 484
combinations (11 types of matrices x 11 of the embedding x weights counted or
by name x GB or GiB), with a constant for the vision tower fitted to three
figures. So many trials fit by chance too: a fitted entry is a guess, and says
that it is fitted. Nothing here is known from the report's authors.
"""

import dataclasses
from typing import Callable

from gemma_qat.model import config as model_config
from gemma_qat.reporting import gpus
from gemma_qat.reporting import memory
from gemma_qat.reporting import storage
from gemma_qat.reporting import vision_tower

SIZES = ('1b', '4b', '12b', '27b')
KV_CONTEXT = 32_768
_NOMINAL = {'1b': 1, '4b': 4, '12b': 12, '27b': 27}  # Billions.
# Fitted: what 4B, 12B and 27B have beyond the text model, in bytes.
_INT4_VISION, _BLOCKS_VISION = 0.6e9, 0.55e9
# Fitted: what one number in the cache takes.
_KV_BYTES = 12


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Published figures and arithmetic that gives them.

  Attributes:
    title: the column of the report.
    layout, embedding: what of ours stands beside it; None for the cache.
    figures: size -> GB as published.
    compute: size -> GB.
    tolerance: GB within which `compute` gives every figure.
    words: what is counted, in a sentence or two.
  """

  title: str
  layout: str | None
  embedding: str | None
  figures: dict[str, float]
  compute: Callable[[str], float]
  tolerance: float
  words: str


def _figures(*values):
  return dict(zip(SIZES, values, strict=True))


def _bf16(size):
  return 2.0 * _NOMINAL[size]


def _sfp8(size):
  vision = vision_tower.tower_weights(model_config.variant(size))
  return _NOMINAL[size] + vision / 1e9


def _int4(size):
  return 0.5 * _NOMINAL[size] + (size != '1b') * _INT4_VISION / 1e9


def _blocks(size):
  text = storage.weights(model_config.variant(size), 'q4_0', 'q8_0').tensors
  return (text + (size != '1b') * _BLOCKS_VISION) / gpus.GIB


def _released(size):
  return storage.weights(model_config.variant(size), 'q4_0', 'f16').file / 1e9


def _cache(size):
  config = model_config.variant(size)
  f16 = memory.kv_cache(config, KV_CONTEXT, 'f16', ubatch=0).total
  return _KV_BYTES / 2 * f16 / 1e9


# Half of the last published digit, and a little where the arithmetic is off.
RECIPES = {
    'bf16': Recipe(
        'report, raw', 'bf16', 'bf16', _figures(2.0, 8.0, 24.0, 54.0), _bf16,
        0.05,
        'two bytes times the number in the name. The text models alone hold '
        '1.00, 3.88, 11.77 and 27.01 billion weights, the vision tower 0.42 '
        'more.',
    ),
    'sfp8': Recipe(
        'report, SFP8', 'sfp8', 'sfp8', _figures(1.0, 4.4, 12.4, 27.4), _sfp8,
        0.05,
        'a byte times the number in the name, and a byte for each of the 417 '
        'million weights of the vision tower.',
    ),
    'released': Recipe(
        'Google\'s GGUF', 'q4_0', 'f16', _figures(1.0, 3.16, 8.07, 17.2),
        _released, 0.03,
        'as computed here: matrices at 4.5 bits (32 codes and a scale of 2 '
        'bytes in 18 bytes), the embedding in float16, the vocabulary (6.5 '
        'MB). The mmproj file comes on top.',
    ),
    'blocks': Recipe(
        'report, blocks', 'q4_0', 'q8_0', _figures(0.7, 2.9, 7.1, 15.3),
        _blocks, 0.05,
        'GiB, not GB, it seems: Q4_0 matrices and a Q8_0 embedding, plus '
        '0.55 * 10^9 bytes from 4B on. That constant is fitted (10.5 bits a '
        'weight of the tower), of 484 combinations tried one of two that fit; '
        'the other, in GB, has no types that are in use (4.125 and 9 bits).',
    ),
    'int4': Recipe(
        'report, int4', 'int4', 'int4', _figures(0.5, 2.6, 6.6, 14.1), _int4,
        0.05,
        'half a byte times the number in the name (scales left out), plus 0.6 '
        'GB from 4B on. That constant is fitted (11.5 bits a weight of the '
        'tower), one of ten that fit of the 484. The models\' README says the '
        'same four figures.',
    ),
    'kv': Recipe(
        'report, KV 32k', None, None, _figures(0.9, 4.7, 14.9, 18.7), _cache,
        0.06,
        'it says 8 bits; the figures are 12 bytes a number (fitted), local '
        'layers at their window: what 12 sequences would take in 8 bits; one '
        'takes a twelfth. '
        'Every layer at 32,768 tokens and 16 bits gives 0.9, 4.6, 12.9, 16.6 '
        'and fits only the first two.',
    ),
}
