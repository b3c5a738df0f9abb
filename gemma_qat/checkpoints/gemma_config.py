"""Which sizes has a checkpoint of Google's, which says none?

They follow from the shapes; what no shape says (window, RoPE, query scale)
from the variant that has them.
"""

from collections.abc import Mapping
import dataclasses
import math

from gemma_qat import errors
from gemma_qat.checkpoints import gemma_names
from gemma_qat.checkpoints import padding
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.model import config as model_config
from gemma_qat.model import vision as vision_config

Shapes = Mapping[str, tuple[int, ...]]
_SIZES = ('num_layers', 'embed_dim', 'mlp_dim', 'num_heads', 'num_kv_heads',
          'head_dim')


def read(
    source: str, shapes: Shapes, tokenizer: tokenizers.Tokenizer | None = None
) -> model_config.ModelConfig:
  """Finds the variant that has these sizes.

  Args:
    source: for messages.
    shapes: of every array, by normal name.
    tokenizer: which rows of the embedding are tokens.

  Raises:
    UserError: sizes are missing, no variant has them, or the tokenizer does
      not fit.
  """
  layers = {n.split('/')[0] for n in shapes if n.startswith('layer_')}
  try:
    rows, d = shapes['embedder/input_embedding']
    n, _, h = shapes['layer_0/attn/q_einsum/w']
    _, k, _, _ = shapes['layer_0/attn/kv_einsum/w']
    f, _ = shapes['layer_0/mlp/linear/w']
  except (KeyError, ValueError) as error:
    raise errors.UserError(
        f'{source} is no Gemma 3 ({error} is missing or misshapen; it has '
        f'{", ".join(list(shapes)[:3])} ...): give a checkpoint of '
        "Kaggle's gemma-3/flax."
    ) from error
  sizes = (len(layers), d, f, n, k, h)
  for known in model_config.VARIANTS.values():
    if sizes == tuple(getattr(known, s) for s in _SIZES):
      return dataclasses.replace(
          known, vocab_size=padding.count_tokens(source, rows, tokenizer)
      )
  raise errors.UserError(
      f'{source} has sizes of no known model: layers, width, MLP width, heads, '
      f'key/value heads, head width are {sizes}. Known are '
      + '; '.join(
          f'{v}: {tuple(getattr(c, s) for s in _SIZES)}'
          for v, c in model_config.VARIANTS.items()
      ) + '.'
  )


def turn_gating(
    places: Mapping[str, gemma_names.Place],
    shapes: Shapes,
    config: model_config.ModelConfig,
) -> dict[str, gemma_names.Place]:
  """Turns gate and up where a file does, which holds [2, D, F] then.

  The library calls it `transpose_gating_einsum`; every Gemma 3 has [2, F, D].
  """
  straight = (2, config.mlp_dim, config.embed_dim)
  turned = (2, config.embed_dim, config.mlp_dim)
  return {
      name: place._replace(axes=(1, 0))
      if place.key.endswith('gating_einsum/w')
      and shapes.get(place.key) == turned != straight else place
      for name, place in places.items()
  }


def read_vision(
    shapes: Shapes, text_dim: int
) -> vision_config.VisionConfig | None:
  """Reads the tower's sizes off its shapes; None without a whole tower.

  Raises:
    UserError: sizes that do not fit each other.
  """
  blocks = {
      n.split('/')[2] for n in shapes if n.startswith('vision/Transformer/')
  }
  block = 'vision/Transformer/encoderblock_0'
  try:
    patch, _, _, width = shapes['vision/embedding/kernel']
    _, positions, _ = shapes['vision/pos_embedding']
    _, heads, _ = shapes[
        f'{block}/MultiHeadDotProductAttention_0/query/kernel'
    ]
    _, mlp_dim = shapes[f'{block}/MlpBlock_0/Dense_0/kernel']
  except (KeyError, ValueError):
    # A tower in part is refused by name, with all that is unknown.
    return None
  if not (patch and heads and positions):
    return None
  return vision_config.VisionConfig(
      text_dim=text_dim,
      image_size=patch * math.isqrt(positions),
      patch_size=patch,
      width=width,
      mlp_dim=mlp_dim,
      num_layers=len(blocks - {'encoder_norm'}),
      num_heads=heads,
      # No shape says it; every public tower pools 4,096 patches to 256.
      tokens_per_image=max(1, positions // 16),
  )
