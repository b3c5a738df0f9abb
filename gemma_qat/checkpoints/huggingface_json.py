"""Which small JSON files does a Hugging Face folder need beside its weights?

Contents as the published Gemma 3 folders have them.
"""

import dataclasses
import json
from typing import Any

from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import huggingface_config
from gemma_qat.checkpoints import names
from gemma_qat.checkpoints import padding
from gemma_qat.checkpoints import tokenizer_out

_IMAGE_FILES = ('preprocessor_config.json', 'processor_config.json')
_GENERATION = 'generation_config.json'
# As generation_config.json calls them -> as GGUF does.
_SAMPLING = {
    'top_k': 'top_k', 'top_p': 'top_p', 'min_p': 'min_p',
    'temperature': 'temp', 'repetition_penalty': 'penalty_repeat',
}


def padding_rows(checkpoint: checkpoints.Checkpoint) -> int:
  """How many rows of zeros the embedding gets: 64 beside a vision tower.

  As in the published folders.
  """
  is_gemma = checkpoint.config.vocab_size == names.VOCABULARY
  if checkpoint.vision is None or not is_gemma:
    return 0
  # The soft token of an image has the id behind Gemma's last, 262,144: its row
  # must be there to be looked up, and tables come in multiples of 64.
  return padding.PADDED_VOCABULARY - names.VOCABULARY


def config(checkpoint: checkpoints.Checkpoint, dtype: str) -> dict[str, Any]:
  """Returns the contents of config.json.

  Gemma3ForCausalLM, or Gemma3ForConditionalGeneration with vision.

  Raises:
    UserError: a query scale that the file cannot hold.
  """
  sizes = dataclasses.replace(
      checkpoint.config,
      vocab_size=checkpoint.config.vocab_size + padding_rows(checkpoint),
  )
  ids = _ids(checkpoint.tokenizer)
  text = huggingface_config.write(sizes, dtype, ids)
  if checkpoint.vision is None:
    return text
  del text['architectures']
  vision = checkpoint.vision.config
  image = tokenizer_out.image_ids(checkpoint.tokenizer)
  return {
      'architectures': ['Gemma3ForConditionalGeneration'],
      'model_type': 'gemma3',
      'text_config': text,
      'vision_config': {
          'model_type': 'siglip_vision_model',
          'hidden_size': vision.width,
          'image_size': vision.image_size,
          'intermediate_size': vision.mlp_dim,
          'layer_norm_eps': vision.norm_epsilon,
          'num_attention_heads': vision.num_heads,
          'num_hidden_layers': vision.num_layers,
          'patch_size': vision.patch_size,
          # The tower is used without SigLIP's pooling head.
          'vision_use_head': False,
      },
      'boi_token_index': image['boi_token'],
      'eoi_token_index': image['eoi_token'],
      'image_token_index': image['image_token'],
      'mm_tokens_per_image': vision.tokens_per_image,
      'tie_word_embeddings': True,
      'torch_dtype': dtype,
      'dtype': dtype,
      **ids,
  }


def beside(checkpoint: checkpoints.Checkpoint) -> dict[str, dict[str, Any]]:
  """Returns what follows from the checkpoint: file name -> contents."""
  files = {}
  ids = _ids(checkpoint.tokenizer)
  if ids:
    files[_GENERATION] = {'cache_implementation': 'hybrid', **ids}
    if isinstance(ids['eos_token_id'], list):
      # What Google gives for its instruction-tuned models.
      files[_GENERATION] |= {'do_sample': True, 'top_k': 64, 'top_p': 0.95}
  if checkpoint.vision is not None:
    vision = checkpoint.vision.config
    size = {'height': vision.image_size, 'width': vision.image_size}
    files[_IMAGE_FILES[0]] = {
        'do_convert_rgb': None,
        'do_normalize': True,
        'do_pan_and_scan': None,
        'do_rescale': True,
        'do_resize': True,
        'image_mean': [0.5, 0.5, 0.5],
        'image_processor_type': 'Gemma3ImageProcessor',
        'image_seq_length': vision.tokens_per_image,
        'image_std': [0.5, 0.5, 0.5],
        'pan_and_scan_max_num_crops': None,
        'pan_and_scan_min_crop_size': None,
        'pan_and_scan_min_ratio_to_activate': None,
        'processor_class': 'Gemma3Processor',
        # Bilinear, as PIL counts.
        'resample': 2,
        'rescale_factor': 1 / 255,
        'size': size,
    }
    files[_IMAGE_FILES[1]] = {
        'image_seq_length': vision.tokens_per_image,
        'processor_class': 'Gemma3Processor',
    }
  return files


def sampling(checkpoint: checkpoints.Checkpoint) -> dict[str, int | float]:
  """Returns how generation_config.json wants tokens drawn, by GGUF's keys.

  What cannot be read there, or is no number, is left out.
  """
  said = beside(checkpoint).get(_GENERATION, {})
  if _GENERATION in checkpoint.extras:
    try:
      said = json.loads(checkpoint.extras[_GENERATION])
    except (ValueError, RecursionError):
      said = {}
  if not isinstance(said, dict):
    return {}
  return {
      f'general.sampling.{key}': said[name] for name, key in _SAMPLING.items()
      if type(said.get(name)) in (int, float)
  }


def verbatim(checkpoint: checkpoints.Checkpoint) -> dict[str, bytes]:
  """Returns the files that go from folder to folder as they are."""
  kept = [_GENERATION]
  if checkpoint.vision is not None:
    kept += _IMAGE_FILES
  return {n: checkpoint.extras[n] for n in kept if n in checkpoint.extras}


def _ids(tokenizer):
  """The ids that config.json and generation_config.json name."""
  if tokenizer is None:
    return {}
  ends = tokenizer.eos_id
  if '<eos>' in tokenizer.pieces and ends == tokenizer.end_of_turn_id:
    # A chat model may end its turn or the text.
    ends = [tokenizer.pieces.index('<eos>'), ends]
  return {
      'bos_token_id': tokenizer.bos_id,
      'eos_token_id': ends,
      'pad_token_id': tokenizer.pad_id,
  }
