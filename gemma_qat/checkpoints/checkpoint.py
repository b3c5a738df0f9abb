"""What is a checkpoint once its file layout no longer matters?"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from gemma_qat import errors
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.model import config as model_config
from gemma_qat.model import vision as vision_config
from gemma_qat.quant import formats
from gemma_qat.quant import rules


# Values in one piece of a weight: 64 MB in float32.
_PIECE = 2**24


class Stored(NamedTuple):
  """A quantized weight as its file holds it.

  format: name in `formats.FORMATS`. quantized: codes and scales, untouched.
  """

  format: str
  quantized: formats.Quantized


class Entry(NamedTuple):
  """A weight that has not been read yet.

  type: as the layout calls it: 'Q4_0', 'F32', 'BF16' ... format: our name of
  it if `read` returns `Stored`, None if it returns an array of `shape`.
  num_bytes: in the file. read: takes a slice of the outermost axis, which is
  never a contracted one, and returns those rows alone, having read no others
  where the file allows it. raw: the same rows as the file's bytes, of types
  that are neither floats nor in `formats`; they can be copied, not made.
  """

  type: str
  format: str | None
  shape: tuple[int, ...]
  num_bytes: int
  read: Callable[[slice], 'np.ndarray | Stored']
  raw: Callable[[slice], np.ndarray] | None = None


class Weights(Mapping):
  """Weights by by-layer name, each read from its file on every access.

  Nothing is kept: a 27B checkpoint costs the memory of its largest tensor.
  """

  def __init__(self, entries: Mapping[str, Entry]):
    self._entries = dict(entries)

  def __getitem__(self, name: str) -> 'np.ndarray | Stored':
    return self._entries[name].read(slice(None))

  def pieces(
      self, name: str, largest: int = _PIECE
  ) -> 'Iterator[tuple[slice, np.ndarray | Stored]]':
    """Reads one weight in slices of its outermost axis, in order.

    The embedding of 27B alone is 5.6 GB in float32: what handles weights of
    any size goes through here.

    Args:
      name: of the weight.
      largest: how many values a piece has at the most (at least one row).
    """
    for rows in self.slices(name, largest):
      yield rows, self._entries[name].read(rows)

  def slices(self, name: str, largest: int = _PIECE) -> Iterator[slice]:
    """Yields the slices that `pieces` reads."""
    shape = self._entries[name].shape
    row = int(np.prod(shape[1:], dtype=np.int64))
    step = max(1, largest // max(1, row))
    for start in range(0, shape[0], step):
      yield slice(start, min(start + step, shape[0]))

  def __contains__(self, name: object) -> bool:
    return name in self._entries

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)

  @property
  def entries(self) -> dict[str, Entry]:
    """What is known of each weight without reading it."""
    return dict(self._entries)


# Hears of each piece of a weight as it is written: (by-layer name, what a
# reader of the file will see, what was to be written). Both are float32
# arrays, or the very same object where nothing was rounded.
OnPiece = Callable[[str, Any, Any], None]


class Vision(NamedTuple):
  """The vision tower and projector beside a text model.

  Names and shapes of the weights are those of `vision.specs(config)`; reading
  one gives the file's own dtype, so that it can pass through unchanged. The
  projector's norm holds w of the gain (1 + w).
  """

  config: vision_config.VisionConfig
  weights: Weights


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A model that was read, or is ready to be read, from somewhere.

  Attributes:
    config: The sizes.
    weights: By-layer name -> float32 array, or `Stored` where the file holds
      codes of one of our formats. Norms hold w of the gain (1 + w), in
      float64 where the file holds the gain and float32 could not say w.
    tokenizer: None where the source has none.
    metadata: What else the source says about itself: plain values.
    source: Path or name, for messages.
    layout: 'gguf', 'huggingface', 'orbax', 'gemma' or 'random'.
    vision: The tower of 4B and larger, where the source has it.
    extras: Small files of a Hugging Face folder that say more than `config`
      and `tokenizer` do: name -> contents.

  Invariant: names and shapes are those of `weights.by_layer_specs(config)`.
  """

  config: model_config.ModelConfig
  weights: Weights
  tokenizer: tokenizers.Tokenizer | None
  metadata: dict[str, Any]
  source: str
  layout: str
  vision: Vision | None = None
  extras: Mapping[str, bytes] = dataclasses.field(
      default_factory=dict, repr=False
  )


def from_arrays(
    arrays: Mapping[str, 'np.ndarray | Stored | tuple[str, formats.Quantized]'],
) -> Weights:
  """Makes `Weights` of what lies in memory already."""
  entries = {}
  for name, value in arrays.items():
    if isinstance(value, tuple):
      stored = Stored(*value)
      codes, scale = stored.quantized
      entries[name] = Entry(
          stored.format.upper(), stored.format, tuple(np.shape(codes)),
          codes.nbytes + scale.nbytes, functools.partial(_cut, stored),
      )
    else:
      value = np.asarray(value)
      entries[name] = Entry(
          str(value.dtype), None, value.shape, value.nbytes, value.__getitem__
      )
  return Weights(entries)


def dequantized(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
  """Reads every weight: by-layer name -> float32, codes times scales.

  Raises:
    UserError: a weight holds NaN or infinity (names it and the source).
  """
  weights = {}
  for name, weight in checkpoint.weights.items():
    weights[name] = to_float32(weight)
    rules.check_finite(f'{checkpoint.source}: {name}', weights[name])
  return weights


def tokenizer(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
  """Returns the tokenizer.

  Raises:
    UserError: the checkpoint has none.
  """
  if checkpoint.tokenizer is None:
    raise errors.UserError(
        f'{checkpoint.source} has no tokenizer that can be read: put its '
        'tokenizer.model beside it.'
    )
  return checkpoint.tokenizer


def to_float32(weight: 'np.ndarray | Stored') -> np.ndarray:
  """Returns the float32 values that a weight stands for."""
  if isinstance(weight, Stored):
    return np.asarray(_dequantize(formats.get(weight.format), weight.quantized))
  return np.asarray(weight, np.float32)


def _cut(stored, rows):
  codes, scale = stored.quantized
  return Stored(
      stored.format,
      formats.Quantized(np.asarray(codes)[rows], np.asarray(scale)[rows]),
  )


# Jitted, the embedding of the 270M takes a tenth of the time.
@functools.partial(jax.jit, static_argnums=0)
def _dequantize(number_format, quantized):
  return number_format.dequantize(quantized)
