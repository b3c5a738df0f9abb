"""What are the sizes of each Gemma 3 variant?"""

import dataclasses
import math
import numbers
from typing import Any

from gemma_qat import errors


# No size of a model is as large.
_LARGEST = 2**40


def check_sizes(config: Any) -> None:
  """Raises a UserError unless every number of a config can be a size.

  Whole ones are 1 to 2^40, others positive and finite: so that no arithmetic
  overflows, whatever a file says. Who loops over layers compares their number
  with the file first.
  """
  for field in dataclasses.fields(config):
    value, kind = getattr(config, field.name), field.type
    if kind in (str, bool):
      is_good = isinstance(value, kind)
      expected = 'a text' if kind is str else 'True or False'
    elif kind is int:
      is_good = _is_number(value, numbers.Integral) and 1 <= value <= _LARGEST
      expected = f'a whole number from 1 to {_LARGEST:,}'
    else:
      # Every float that a float32 can be is below.
      is_good = _is_number(value, numbers.Real) and 0 < value < 1e39
      expected = 'a positive number'
    if not is_good:
      raise errors.UserError(
          f'The model has {field.name} {value!r:.100}, expected {expected}: '
          'check its config.'
      )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The hyperparameters of one Gemma 3 text model.

  Axis letters as in `layers.py`: D width, N query heads, K key/value heads,
  H head width, F MLP width, V vocabulary.

  Invariants: `check_sizes` holds; N is a multiple of K; every layer i with
  (i + 1) % `pattern` == 0 attends globally, the others see the last
  `sliding_window` tokens.
  """

  variant: str
  num_layers: int
  embed_dim: int
  mlp_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  sliding_window: int
  context_length: int
  vocab_size: int = 262_144
  # Positions of the global layers are divided by this (linear RoPE scaling).
  rope_scaling: float = 1.0
  rope_base_local: float = 10_000.0
  rope_base_global: float = 1_000_000.0
  # Queries are multiplied by query_scale_dim ** -0.5.
  query_scale_dim: float = 256.0
  norm_epsilon: float = 1e-6
  pattern: int = 6
  # Whether whole groups are stacked and computed by one scan. Without it every
  # layer has its own path in the tree, and is compiled for itself.
  is_scanned: bool = True

  def __post_init__(self):
    check_sizes(self)
    if self.num_heads % self.num_kv_heads:
      raise errors.UserError(
          f'{self.num_heads} query heads cannot share {self.num_kv_heads} '
          'key/value heads: the first must be a multiple of the second.'
      )

  @property
  def num_groups(self) -> int:
    """Whole groups of `pattern` layers: what the model scans over."""
    return self.num_layers // self.pattern if self.is_scanned else 0

  @property
  def num_tail_layers(self) -> int:
    """Layers after the last group of the scan."""
    return self.num_layers - self.num_groups * self.pattern

  @property
  def query_scale(self) -> float:
    return self.query_scale_dim**-0.5

  @property
  def embedding_multiplier(self) -> float:
    """sqrt(D) in float32; the model can round it to bfloat16 instead."""
    return math.sqrt(self.embed_dim)

  def is_global(self, layer: int) -> bool:
    return (layer + 1) % self.pattern == 0


def _is_number(value, kind):
  return isinstance(value, kind) and not isinstance(value, bool)


def _gemma3(variant, layers, d, f, n, k, h, window, context, **rest):
  return ModelConfig(
      variant=variant,
      num_layers=layers,
      embed_dim=d,
      mlp_dim=f,
      num_heads=n,
      num_kv_heads=k,
      head_dim=h,
      sliding_window=window,
      context_length=context,
      **rest,
  )


# Source: the Gemma 3 technical report, table 1, and the public checkpoints.
VARIANTS = {
    c.variant: c
    for c in (
        # Eight layers: one whole group and a tail, like the real sizes; every
        # structural feature (GQA, window, RoPE scaling) is switched on.
        _gemma3(
            'tiny', 8, 64, 128, 4, 2, 32, 16, 512,
            vocab_size=512, rope_scaling=8.0, query_scale_dim=32,
        ),
        _gemma3('270m', 18, 640, 2048, 4, 1, 256, 512, 32_768),
        _gemma3('1b', 26, 1152, 6912, 4, 1, 256, 512, 32_768),
        _gemma3(
            '4b', 34, 2560, 10_240, 8, 4, 256, 1024, 131_072, rope_scaling=8.0
        ),
        _gemma3(
            '12b', 48, 3840, 15_360, 16, 8, 256, 1024, 131_072,
            rope_scaling=8.0,
        ),
        # 27B alone scales its queries by D / N instead of the head width.
        _gemma3(
            '27b', 62, 5376, 21_504, 32, 16, 128, 1024, 131_072,
            rope_scaling=8.0, query_scale_dim=5376 / 32,
        ),
    )
}


def variant(name: str) -> ModelConfig:
  """Returns the config of a named size, or a UserError that lists them."""
  if name not in VARIANTS:
    raise errors.UserError(
        f'Unknown model variant {name!r}: choose one of {", ".join(VARIANTS)}.'
    )
  return VARIANTS[name]


def find_variant(config: ModelConfig) -> str:
  """Names the variant that has these sizes; 'custom' when there is none."""
  sizes = ('num_layers', 'embed_dim', 'mlp_dim', 'num_heads', 'num_kv_heads')
  for name, known in VARIANTS.items():
    if all(getattr(known, s) == getattr(config, s) for s in sizes):
      return name
  return 'custom'
