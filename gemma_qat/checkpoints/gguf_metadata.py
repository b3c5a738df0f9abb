"""How are model sizes and tokenizer said in a GGUF's metadata?

Keys as llama.cpp's gemma3 loader wants them, and in the order of the files
that its converter writes.
"""

import dataclasses
from typing import Any

import gguf
import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import gguf_header
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.model import config as model_config

ARCHITECTURE = 'gemma3'

_REQUIRED = {
    'num_layers': 'block_count',
    'embed_dim': 'embedding_length',
    'mlp_dim': 'feed_forward_length',
    'num_heads': 'attention.head_count',
    'num_kv_heads': 'attention.head_count_kv',
    'head_dim': 'attention.key_length',
    'sliding_window': 'attention.sliding_window',
    'context_length': 'context_length',
    'norm_epsilon': 'attention.layer_norm_rms_epsilon',
    'rope_base_global': 'rope.freq_base',
}
# llama.cpp has no key for the query scale: it takes D / N for this many
# layers, which only the 27B has.
_LAYERS_OF_27B = 62
_PATTERN_KEY, _PATTERN = 'attention.sliding_window_pattern', 6
_BOS, _EOS, _UNK, _PAD = 2, 1, 3, 0


def read_config(
    metadata: dict[str, Any], source: str, vocab_size: int
) -> model_config.ModelConfig:
  """Builds the sizes from metadata.

  Args:
    metadata: as `gguf_header.read` returns it.
    source: the file, for messages.
    vocab_size: rows of the embedding.

  Raises:
    UserError: not a Gemma 3, or a key is missing or of the wrong type.
  """
  architecture = gguf_header.text(metadata, source, 'general.architecture')
  if architecture != ARCHITECTURE:
    raise errors.UserError(
        f'{source} holds architecture {architecture!r}, not {ARCHITECTURE!r}: '
        'give a Gemma 3 text model.'
    )
  number = lambda key, default=None: _number(metadata, source, key, default)
  sizes = {field: number(key) for field, key in _REQUIRED.items()}
  sizes['pattern'] = number(_PATTERN_KEY, _PATTERN)
  for field in sizes.keys() - {'norm_epsilon', 'rope_base_global'}:
    if not isinstance(sizes[field], int) or sizes[field] < 1:
      key = _REQUIRED.get(field, _PATTERN_KEY)
      raise errors.UserError(
          f'{source}: {ARCHITECTURE}.{key} is {sizes[field]}, expected a '
          'positive integer.'
      )
  if number('attention.value_length', sizes['head_dim']) != sizes['head_dim']:
    raise errors.UserError(
        f'{source}: attention.value_length differs from key_length, which no '
        'Gemma 3 has.'
    )
  rope_scaling = _rope_scaling(metadata, source)
  rope_base_local = number('rope.freq_base_swa', 10_000.0)
  with errors.about(source):
    config = model_config.ModelConfig(
        variant='custom',
        vocab_size=vocab_size,
        # A float32 in the file: 1e-6 comes back as 9.99999997e-07.
        **sizes | {'norm_epsilon': float(f'{sizes["norm_epsilon"]:.6g}')},
        rope_scaling=rope_scaling,
        rope_base_local=rope_base_local,
        query_scale_dim=_query_scale_dim(sizes),
    )
  return dataclasses.replace(
      config, variant=model_config.find_variant(config)
  )


def add_config(
    writer: gguf.GGUFWriter, config: model_config.ModelConfig
) -> None:
  """Writes the sizes.

  Raises:
    UserError: llama.cpp would derive another query scale or layer pattern
      than the model has.
  """
  expected = _query_scale_dim(config.__dict__)
  if config.query_scale_dim != expected or config.pattern != _PATTERN:
    raise errors.UserError(
        f'A GGUF cannot say query_scale_dim {config.query_scale_dim:g} and '
        f'pattern {config.pattern}: llama.cpp takes {expected:g} and '
        f'{_PATTERN} for these sizes. Export another layout.'
    )
  writer.add_context_length(config.context_length)
  writer.add_embedding_length(config.embed_dim)
  writer.add_block_count(config.num_layers)
  writer.add_feed_forward_length(config.mlp_dim)
  writer.add_head_count(config.num_heads)
  writer.add_layer_norm_rms_eps(config.norm_epsilon)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_rope_freq_base(config.rope_base_global)
  writer.add_float32(
      f'{ARCHITECTURE}.rope.freq_base_swa', config.rope_base_local
  )
  if config.rope_scaling != 1:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(config.rope_scaling)
  writer.add_sliding_window(config.sliding_window)
  writer.add_head_count_kv(config.num_kv_heads)


def read_tokenizer(
    metadata: dict[str, Any], source: str
) -> tokenizers.Tokenizer | None:
  """Builds the tokenizer from metadata; None where the file has none.

  Raises:
    UserError: not a SentencePiece vocabulary, or a damaged one.
  """
  kind = gguf_header.text(metadata, source, 'tokenizer.ggml.model')
  if kind in (None, 'none', 'no_vocab'):
    return None
  arrays = [
      metadata.get(f'tokenizer.ggml.{key}')
      for key in ('tokens', 'scores', 'token_type')
  ]
  if kind != 'llama' or any(a is None for a in arrays):
    raise errors.UserError(
        f'{source} has a vocabulary of kind {kind!r} or without scores and '
        'types: Gemma\'s is SentencePiece ("llama"), convert the model again '
        'with its tokenizer.model.'
    )
  if [isinstance(a, kind) for a, kind in zip(
      arrays, (list, np.ndarray, np.ndarray), strict=True
  )] != [True] * 3:
    raise errors.UserError(
        f'{source}: pieces, scores and types of the vocabulary are not lists '
        'of texts and numbers: convert the model again.'
    )
  pieces, scores, types = arrays
  template = gguf_header.text(metadata, source, 'tokenizer.chat_template')
  get = lambda key, default: metadata.get(f'tokenizer.ggml.{key}', default)
  with errors.about(source):
    return tokenizers.from_pieces(
        pieces, scores, types,
        bos_id=get('bos_token_id', _BOS),
        eos_id=get('eos_token_id', _EOS),
        pad_id=get('padding_token_id', _PAD),
        unk_id=get('unknown_token_id', _UNK),
        chat_template=template,
    )


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: tokenizers.Tokenizer
) -> None:
  """Writes the vocabulary; BOS is added to every prompt, EOS to none."""
  writer.add_tokenizer_model('llama')
  writer.add_tokenizer_pre('default')
  writer.add_token_list(tokenizer.pieces)
  writer.add_token_scores(np.asarray(tokenizer.scores).tolist())
  writer.add_token_types(np.asarray(tokenizer.types).tolist())
  writer.add_bos_token_id(tokenizer.bos_id)
  writer.add_eos_token_id(tokenizer.eos_id)
  if tokenizer.end_of_turn_id is not None:
    writer.add_eot_token_id(tokenizer.end_of_turn_id)
  writer.add_unk_token_id(tokenizer.unk_id)
  writer.add_pad_token_id(tokenizer.pad_id)
  writer.add_add_bos_token(True)
  writer.add_add_eos_token(False)
  writer.add_add_space_prefix(False)
  if tokenizer.chat_template is not None:
    writer.add_chat_template(tokenizer.chat_template)


def _number(metadata, source, key, default):
  value = metadata.get(f'{ARCHITECTURE}.{key}', default)
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    return value
  problem = 'lacks' if value is None else 'has no single number for'
  raise errors.UserError(
      f'{source} {problem} the metadata key {ARCHITECTURE}.{key}: convert the '
      'model again with a current converter.'
  )


def _rope_scaling(metadata, source):
  kind = gguf_header.text(
      metadata, source, f'{ARCHITECTURE}.rope.scaling.type', 'linear'
  )
  if kind not in ('linear', 'none'):
    raise errors.UserError(
        f'{source} scales RoPE by {kind!r}; Gemma 3 knows only linear scaling.'
    )
  # Files of 2023 spell the factor scale_linear.
  legacy = _number(metadata, source, 'rope.scale_linear', 1.0)
  factor = _number(metadata, source, 'rope.scaling.factor', legacy)
  return float(factor) if kind == 'linear' and factor else 1.0


def _query_scale_dim(sizes):
  if sizes['num_layers'] == _LAYERS_OF_27B:
    return sizes['embed_dim'] / sizes['num_heads']
  return float(sizes['head_dim'])
