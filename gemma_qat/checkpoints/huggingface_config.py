"""How are the model sizes said in a Hugging Face config.json?

Read: the text-only and the vision form, the keys before and after
transformers 5 (rope_theta ... and rope_parameters, sliding_window_pattern and
layer_types). Written: both, because mlx-lm reads only the older ones.
"""

import dataclasses
from typing import Any

from gemma_qat import errors
from gemma_qat.model import config as model_config
from gemma_qat.model import vision as vision_config

# transformers' defaults for Gemma3TextConfig: published files leave these out.
_DEFAULTS = {
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'head_dim': 256,
    'query_pre_attn_scalar': 256,
    'max_position_embeddings': 131_072,
    'rms_norm_eps': 1e-6,
    'sliding_window': 4096,
}
_VISION = {
    'image_size': 'image_size',
    'patch_size': 'patch_size',
    'width': 'hidden_size',
    'mlp_dim': 'intermediate_size',
    'num_layers': 'num_hidden_layers',
    'num_heads': 'num_attention_heads',
    'norm_epsilon': 'layer_norm_eps',
}
_PATTERN = 6
_ROPE_GLOBAL, _ROPE_LOCAL = 1_000_000.0, 10_000.0
# Settings that change the arithmetic, and the only value that we compute.
_FIXED = {
    'hidden_activation': 'gelu_pytorch_tanh',
    'attention_bias': False,
    'final_logit_softcapping': None,
    'attn_logit_softcapping': None,
    'use_bidirectional_attention': False,
    'tie_word_embeddings': True,
}


def read(
    config: dict[str, Any], source: str, vocab_size: int
) -> model_config.ModelConfig:
  """Builds the sizes from the contents of a config.json.

  Args:
    config: the parsed file.
    source: its path, for messages.
    vocab_size: rows of the embedding that count.

  Raises:
    UserError: not a Gemma 3, or a setting that the model does not compute.
  """
  try:
    return _read(config, source, vocab_size)
  except (AttributeError, TypeError, ValueError, OverflowError) as error:
    raise errors.UserError(
        f'{source} holds a value of the wrong kind ({error}): fetch it again.'
    ) from error


def read_vision(
    config: dict[str, Any], source: str, text_dim: int
) -> vision_config.VisionConfig:
  """Builds the sizes of the vision tower from the same file.

  Args:
    config: the parsed file.
    source: its path, for messages.
    text_dim: width of the text model.

  Raises:
    UserError: values that are no sizes.
  """
  said = config.get('vision_config') or {}
  defaults = vision_config.VisionConfig(text_dim)
  try:
    sizes = {
        field: type(getattr(defaults, field))(
            said.get(key, getattr(defaults, field))
        )
        for field, key in _VISION.items()
    }
    sizes['tokens_per_image'] = int(
        config.get('mm_tokens_per_image', defaults.tokens_per_image)
    )
  except (AttributeError, TypeError, ValueError, OverflowError) as error:
    raise errors.UserError(
        f'{source}: vision_config holds a value of the wrong kind ({error}): '
        'fetch it again.'
    ) from error
  for field, value in sizes.items():
    if value <= 0:
      raise errors.UserError(
          f'{source}: vision_config.{_VISION.get(field, field)} is {value}, '
          'expected a positive number.'
      )
  with errors.about(source):
    return vision_config.VisionConfig(text_dim, **sizes)


def write(
    config: model_config.ModelConfig,
    dtype: str,
    ids: dict[str, int],
) -> dict[str, Any]:
  """Returns the contents of a config.json for Gemma3ForCausalLM.

  Args:
    config: the sizes.
    dtype: 'float32' or 'bfloat16', what the file holds.
    ids: bos_token_id, eos_token_id, pad_token_id, where known.

  Raises:
    UserError: a query scale that the file cannot hold.
  """
  if config.query_scale_dim % 1:
    raise errors.UserError(
        f'A config.json cannot say query_scale_dim {config.query_scale_dim}: '
        'transformers wants a whole number.'
    )
  scaling = None
  if config.rope_scaling != 1:
    scaling = {'rope_type': 'linear', 'factor': config.rope_scaling}
  global_rope = scaling or {'rope_type': 'default'}
  kinds = {True: 'full_attention', False: 'sliding_attention'}
  return {
      'architectures': ['Gemma3ForCausalLM'],
      'model_type': 'gemma3_text',
      **_FIXED,
      'vocab_size': config.vocab_size,
      'hidden_size': config.embed_dim,
      'intermediate_size': config.mlp_dim,
      'num_hidden_layers': config.num_layers,
      'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads,
      'head_dim': config.head_dim,
      # transformers 5 refuses a float here.
      'query_pre_attn_scalar': int(config.query_scale_dim),
      'max_position_embeddings': config.context_length,
      'rms_norm_eps': config.norm_epsilon,
      'sliding_window': config.sliding_window,
      'sliding_window_pattern': config.pattern,
      'layer_types': [
          kinds[config.is_global(i)] for i in range(config.num_layers)
      ],
      'rope_theta': config.rope_base_global,
      'rope_local_base_freq': config.rope_base_local,
      'rope_scaling': scaling,
      'rope_parameters': {
          'full_attention': {
              'rope_theta': config.rope_base_global, **global_rope
          },
          'sliding_attention': {
              'rope_theta': config.rope_base_local, 'rope_type': 'default'
          },
      },
      'attention_dropout': 0.0,
      'torch_dtype': dtype,
      'dtype': dtype,
      **ids,
  }


def _read(config, source, vocab_size):
  text = config.get('text_config', config)
  kind = config.get('model_type')
  if kind not in ('gemma3', 'gemma3_text') or not isinstance(text, dict):
    raise errors.UserError(
        f'{source} says model_type {kind!r}: give a Gemma 3 ("gemma3" or '
        '"gemma3_text").'
    )
  for key, only in _FIXED.items():
    if text.get(key, only) not in (only, None):
      raise errors.UserError(
          f'{source} sets {key} to {text[key]!r}, but only {only!r} is '
          'supported.'
      )
  get = lambda key: _number(text, source, key)
  layers = int(get('num_hidden_layers'))
  rope = _rope(text, source)
  sizes = {
      'num_layers': layers,
      'embed_dim': int(get('hidden_size')),
      'mlp_dim': int(get('intermediate_size')),
      'num_heads': int(get('num_attention_heads')),
      'num_kv_heads': int(get('num_key_value_heads')),
      'head_dim': int(get('head_dim')),
      'sliding_window': int(get('sliding_window')),
      'context_length': int(get('max_position_embeddings')),
      'vocab_size': vocab_size,
      'query_scale_dim': float(get('query_pre_attn_scalar')),
      'norm_epsilon': float(get('rms_norm_eps')),
      'pattern': _pattern(text, source, layers),
      **rope,
  }
  with errors.about(source):
    config = model_config.ModelConfig(variant='custom', **sizes)
  return dataclasses.replace(
      config, variant=model_config.find_variant(config)
  )


def _number(text, source, key):
  value = text.get(key)
  value = _DEFAULTS.get(key) if value is None else value
  if isinstance(value, bool) or not isinstance(value, (int, float)) or (
      value <= 0
  ):
    raise errors.UserError(
        f'{source}: {key} is {value!r}, expected a positive number.'
    )
  return value


def _pattern(text, source, layers):
  """Finds the pattern p with which layer i is global iff (i + 1) % p == 0."""
  kinds = text.get('layer_types')
  if kinds is None:
    return int(text.get('sliding_window_pattern') or _PATTERN)
  is_full = [kind == 'full_attention' for kind in kinds]
  pattern = is_full.index(True) + 1 if True in is_full else _PATTERN
  # As many as there are kinds: a damaged number of layers may be billions.
  is_nth = [(i + 1) % pattern == 0 for i in range(len(kinds))]
  if len(kinds) != layers or is_full != is_nth:
    raise errors.UserError(
        f'{source}: layer_types is not {layers} layers of which every n-th is '
        'full attention.'
    )
  return pattern


def _rope(text, source):
  """Returns the three RoPE fields of the config."""
  parameters = text.get('rope_parameters') or {}
  full = parameters.get('full_attention', {})
  local = parameters.get('sliding_attention', {})
  scaling = full or text.get('rope_scaling') or {}
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if kind not in ('default', 'linear'):
    raise errors.UserError(
        f'{source} scales RoPE by {kind!r}: only linear scaling is supported.'
    )
  factor = scaling.get('factor', 1.0) if kind == 'linear' else 1.0
  return {
      'rope_scaling': float(factor),
      'rope_base_global': float(
          full.get('rope_theta', text.get('rope_theta', _ROPE_GLOBAL))
      ),
      'rope_base_local': float(
          local.get('rope_theta', text.get('rope_local_base_freq', _ROPE_LOCAL))
      ),
  }
