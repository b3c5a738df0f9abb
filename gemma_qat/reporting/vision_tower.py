"""How many weights and bytes does the vision tower add?

SigLIP so400m, as 4B and larger carry it, and the projector into the text
model's width. Quantization-aware training leaves both as they are.
"""

from gemma_qat.model import config as model_config

_SIZES = ('4b', '12b', '27b')
_LAYERS, _WIDTH, _MLP = 27, 1152, 4304
_PATCH, _POSITIONS = 14, 4096
_PARTS = ('matrices', 'embeddings', 'vectors', 'projector', 'projector_norm')


def has_vision(config: model_config.ModelConfig) -> bool:
  """Whether the published model of this size reads images."""
  return config.variant in _SIZES


def weight_counts(config: model_config.ModelConfig) -> dict[str, int]:
  """Number of weights; all 0 in a size without vision.

  Returns:
    'matrices' of the layers, 'embeddings' of patches and positions, 'vectors'
    (norms and biases), the 'projector' and the norm before it.
  """
  if not has_vision(config):
    return dict.fromkeys(_PARTS, 0)
  a_norm = 2 * _WIDTH  # Gain and bias.
  return {
      'matrices': _LAYERS * (4 * _WIDTH**2 + 2 * _WIDTH * _MLP),
      'embeddings': (
          3 * _PATCH**2 * _WIDTH + _WIDTH + _POSITIONS * _WIDTH
      ),
      'vectors': _LAYERS * (2 * a_norm + 5 * _WIDTH + _MLP) + a_norm,
      'projector': _WIDTH * config.embed_dim,
      'projector_norm': _WIDTH,
  }


def tower_weights(config: model_config.ModelConfig) -> int:
  """Number of weights without the projector: the report's 417 million."""
  return sum(
      count for part, count in weight_counts(config).items()
      if not part.startswith('projector')
  )


def mmproj_bytes(config: model_config.ModelConfig) -> int:
  """Tensor bytes of llama.cpp's mmproj file: matrices float16, the rest
  float32; the converter forces the embeddings to float32.
  """
  counts = weight_counts(config)
  halves = counts['matrices'] + counts['projector']
  return 2 * halves + 4 * (sum(counts.values()) - halves)


def folder_bytes(config: model_config.ModelConfig) -> int:
  """Bytes in a folder that stores everything in bfloat16."""
  return 2 * sum(weight_counts(config).values())
