"""How many bytes does a Gemma 3 take in each layout?

Counted from the declared shapes and the formats; tests hold the figures against
files that exist.
"""

from collections.abc import Mapping
import dataclasses
import math

from gemma_qat import errors
from gemma_qat.model import config as model_config
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import formats

# What precedes the tensors of a Q4_0 file of the packaged 270M, measured: the
# vocabulary of 262,144 tokens, some keys, 236 entries of about 60 bytes.
_HEADER_BYTES, _HEADER_TOKENS = 6_525_184, 262_144


@dataclasses.dataclass(frozen=True)
class Type:
  """What a weight takes: `block_bytes` for `block` weights in a row.

  `channel_bytes` come on top for every output channel.
  """

  block: int
  block_bytes: int
  channel_bytes: int = 0

  def size(self, spec: model_weights.WeightSpec) -> int:
    """Bytes of a weight whose last axis is a multiple of the block."""
    count = math.prod(spec.shape)
    channels = count // spec.row_length if spec.contraction else 0
    return count // self.block * self.block_bytes + (
        channels * self.channel_bytes
    )


def _of_format(name):
  f = formats.get(name)
  return Type(f.block, int(f.bits_per_weight * f.block / 8))


TYPES = {
    'q4_0': _of_format('q4_0'),
    'q8_0': _of_format('q8_0'),
    'q6_k': Type(256, 210),
    'f16': Type(1, 2),
    'bf16': Type(1, 2),
    'f32': Type(1, 4),
    'int4': Type(2, 1, channel_bytes=4),
    'sfp8': Type(1, 1),
    # Compressed-tensors: codes and a bfloat16 scale.
    'w4a16': Type(32, 16 + 2),
    # MLX: codes, scale and bias, both in bfloat16 or both in float32.
    'mlx4': Type(32, 16 + 2 * 2),
    'mlx8': Type(32, 32 + 2 * 2),
    'mlx4_f32': Type(32, 16 + 2 * 4),
    'mlx8_f32': Type(32, 32 + 2 * 4),
}
_GGUF = ('q8_0', 'q4_0', 'q6_k', 'f16', 'bf16', 'f32')


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a whole model is stored.

  Attributes:
    matrices, norms: names in TYPES.
    embeddings: types that the tied embedding may have, the default first.
    where: the kind of file, in words.
    matrix_bytes: on top for every matrix.
    header: whether the vocabulary stands in the file, as in GGUF.
  """

  matrices: str
  embeddings: tuple[str, ...]
  where: str
  norms: str = 'f32'
  matrix_bytes: int = 0
  header: bool = False


def _gguf(matrices, embeddings=_GGUF):
  return Layout(matrices, embeddings, 'GGUF', header=True)


LAYOUTS = {
    'bf16': Layout('bf16', ('bf16',), 'Hugging Face folder', norms='bf16'),
    'f16': _gguf('f16', ('f16', *_GGUF)),
    'q8_0': _gguf('q8_0'),
    'sfp8': Layout('sfp8', ('sfp8', 'bf16'), 'SFP8, as gemma.cpp stores it'),
    'q4_0': _gguf('q4_0'),
    # `weight_shape`, two int64, stands beside the codes of every matrix.
    'w4a16': Layout(
        'w4a16', ('bf16',), 'compressed-tensors folder', norms='bf16',
        matrix_bytes=16,
    ),
    'mlx': Layout('mlx4', ('mlx8', 'mlx4', 'bf16'), 'MLX folder', norms='bf16'),
    'mlx_f32': Layout(
        'mlx4_f32', ('mlx8_f32', 'mlx4_f32', 'f32'),
        'MLX folder, float32 scales',
    ),
    'int4': Layout(
        'int4', ('int4', 'q8_0', 'f16', 'bf16'),
        'int4, one float32 scale a channel',
    ),
}


@dataclasses.dataclass(frozen=True)
class Weights:
  """Bytes of a stored text model; `header` lies in the file alone."""

  matrices: int
  embedding: int
  norms: int
  header: int

  @property
  def tensors(self) -> int:
    return self.matrices + self.embedding + self.norms

  @property
  def file(self) -> int:
    return self.tensors + self.header


def weight_counts(config: model_config.ModelConfig) -> Mapping[str, int]:
  """Number of weights in 'matrices', 'embedding' and 'norms'."""
  counts = dict.fromkeys(('matrices', 'embedding', 'norms'), 0)
  for name, spec in model_weights.by_layer_specs(config).items():
    counts[_part(name, spec)] += math.prod(spec.shape)
  return counts


def layout(name: str) -> Layout:
  """Returns a layout by name, or a UserError that lists the names."""
  if name not in LAYOUTS:
    raise errors.UserError(
        f'Unknown format {name!r}: choose one of {", ".join(LAYOUTS)}.'
    )
  return LAYOUTS[name]


def has_whole_blocks(
    config: model_config.ModelConfig, embedding: str
) -> bool:
  """Whether a row of the embedding is cut into whole blocks of a type."""
  return config.embed_dim % TYPES[embedding].block == 0


def weights(
    config: model_config.ModelConfig, name: str, embedding: str | None = None
) -> Weights:
  """Counts the bytes of a model's weights.

  Args:
    config: the sizes.
    name: key in LAYOUTS.
    embedding: type of the embedding; None for the layout's usual one.

  Raises:
    UserError: unknown layout, or an embedding that it or the width forbids.
  """
  found = layout(name)
  embedding = embedding or found.embeddings[0]
  if embedding not in found.embeddings:
    raise errors.UserError(
        f'{name} holds no {embedding!r} embedding: choose one of '
        f'{", ".join(dict.fromkeys(found.embeddings))}.'
    )
  if not has_whole_blocks(config, embedding):
    raise errors.UserError(
        f'{embedding} has blocks of {TYPES[embedding].block} weights, but an '
        f'embedding row of {config.variant} has {config.embed_dim}: choose '
        f'{found.embeddings[0]} for it.'
    )
  sizes = dict.fromkeys(('matrices', 'embedding', 'norms'), 0)
  types = {
      'matrices': found.matrices, 'embedding': embedding, 'norms': found.norms
  }
  for weight, spec in model_weights.by_layer_specs(config).items():
    part = _part(weight, spec)
    sizes[part] += TYPES[types[part]].size(spec)
    if part == 'matrices':
      sizes[part] += found.matrix_bytes
  header = _HEADER_BYTES * config.vocab_size // _HEADER_TOKENS
  return Weights(**sizes, header=header if found.header else 0)


def _part(name, spec):
  if not spec.contraction:
    return 'norms'
  return 'embedding' if name == 'embedding' else 'matrices'
