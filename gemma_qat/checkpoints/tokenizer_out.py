"""How does a tokenizer go into a Hugging Face folder, for every reader?"""

import pathlib
from typing import Any

from gemma_qat.checkpoints import huggingface_tokenizer
from gemma_qat.checkpoints import padding
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.data import vocabulary

_SPACE = '\u2581'
_IMAGE_IDS = {'boi_token': 255_999, 'eoi_token': 256_000,
              'image_token': 262_144}
_NO_LIMIT = 1000000000000000019884624838656


def image_ids(tokenizer: tokenizers.Tokenizer | None) -> dict[str, int]:
  """Returns the ids of boi_token, eoi_token and image_token.

  Gemma's own without a tokenizer; pieces that a vocabulary lacks get the ids
  behind its last.
  """
  if tokenizer is None:
    return dict(_IMAGE_IDS)
  ids, behind = {}, tokenizer.vocab_size
  for name, piece in padding.IMAGE_PIECES.items():
    if piece in tokenizer.pieces:
      ids[name] = tokenizer.pieces.index(piece)
    else:
      ids[name], behind = behind, behind + 1
  return ids


def save(
    tokenizer: tokenizers.Tokenizer, folder: pathlib.Path, images: bool = False
) -> None:
  """Writes tokenizer.model, tokenizer.json, their settings, chat template.

  Args:
    tokenizer: what is written.
    folder: exists already.
    images: whether the image tokens are declared.
  """
  (folder / 'tokenizer.model').write_bytes(tokenizer.to_proto())
  added = _added_tokens(tokenizer, images)
  write = huggingface_tokenizer.write_json
  write(folder / 'tokenizer.json', _fast(tokenizer, added))
  named = {
      f'{name}_token': tokenizer.pieces[getattr(tokenizer, f'{name}_id')]
      for name in ('bos', 'eos', 'pad', 'unk')
  }
  if images:
    named |= padding.IMAGE_PIECES
    behind = {
        token['content']: i for i, token in added.items()
        if i >= tokenizer.vocab_size
    }
    write(folder / 'added_tokens.json', behind)
  write(folder / 'special_tokens_map.json', named)
  settings = {
      'tokenizer_class': 'GemmaTokenizer',
      'add_bos_token': True,
      'add_eos_token': False,
      'clean_up_tokenization_spaces': False,
      'model_max_length': _NO_LIMIT,
      'padding_side': 'left',
      'sp_model_kwargs': None,
      'spaces_between_special_tokens': False,
      'use_default_system_prompt': False,
      # Without this list llama.cpp's converter gives 6,411 tokens of Gemma
      # the wrong type.
      'added_tokens_decoder': {str(i): token for i, token in added.items()},
      **named,
  }
  if images:
    settings['extra_special_tokens'] = dict(padding.IMAGE_PIECES)
    settings['processor_class'] = 'Gemma3Processor'
  if tokenizer.chat_template is not None:
    settings['chat_template'] = tokenizer.chat_template
    (folder / 'chat_template.jinja').write_text(
        tokenizer.chat_template, encoding='utf-8'
    )
  write(folder / 'tokenizer_config.json', settings)


def _added_tokens(tokenizer, images):
  """Returns {id: what Hugging Face says of a token found before all merging}.
  """
  special = (vocabulary.CONTROL, vocabulary.UNKNOWN)
  added = {}
  for i, (piece, kind) in enumerate(zip(tokenizer.pieces, tokenizer.types)):
    if int(kind) in (*special, vocabulary.USER_DEFINED):
      added[i] = _added(piece, int(kind) in special)
  if images:
    for name, i in image_ids(tokenizer).items():
      added[i] = _added(padding.IMAGE_PIECES[name], True)
  return dict(sorted(added.items()))


def _added(piece, is_special):
  return {
      'content': piece.replace(' ', _SPACE),
      'lstrip': False,
      # USER_DEFINED pieces are looked for in the text with U+2581 for spaces,
      # as SentencePiece does: else no run of spaces would be found.
      'normalized': not is_special,
      'rstrip': False,
      'single_word': False,
      'special': is_special,
  }


def _fast(tokenizer, added) -> dict[str, Any]:
  """Returns the contents of tokenizer.json: the same BPE, said by merges."""
  bos = tokenizer.pieces[tokenizer.bos_id]
  begin = {'SpecialToken': {'id': bos, 'type_id': 0}}
  text = lambda name, i: {'Sequence': {'id': name, 'type_id': i}}
  again = {'SpecialToken': {'id': bos, 'type_id': 1}}
  vocab = {
      piece.replace(' ', _SPACE): i
      for i, piece in enumerate(tokenizer.pieces)
  }
  return {
      'version': '1.0',
      'truncation': None,
      'padding': None,
      'added_tokens': [{'id': i, **token} for i, token in added.items()],
      'normalizer': {
          'type': 'Replace', 'pattern': {'String': ' '}, 'content': _SPACE,
      },
      'pre_tokenizer': {
          'type': 'Split', 'pattern': {'String': ' '},
          'behavior': 'MergedWithPrevious', 'invert': False,
      },
      'post_processor': {
          'type': 'TemplateProcessing',
          'single': [begin, text('A', 0)],
          'pair': [begin, text('A', 0), again, text('B', 1)],
          'special_tokens': {
              bos: {'id': bos, 'ids': [tokenizer.bos_id], 'tokens': [bos]},
          },
      },
      'decoder': {
          'type': 'Sequence',
          'decoders': [
              {'type': 'Replace', 'pattern': {'String': _SPACE},
               'content': ' '},
              {'type': 'ByteFallback'},
              {'type': 'Fuse'},
          ],
      },
      'model': {
          'type': 'BPE',
          'dropout': None,
          'unk_token': tokenizer.pieces[tokenizer.unk_id],
          'continuing_subword_prefix': None,
          'end_of_word_suffix': None,
          'fuse_unk': True,
          'byte_fallback': True,
          'ignore_merges': False,
          'vocab': vocab,
          'merges': _merges(tokenizer),
      },
  }


def _merges(tokenizer):
  """Returns the pairs that join, best score first.

  SentencePiece joins any two neighbours whose join is a piece; a list of
  merges says which pairs these are. Only NORMAL pieces take part: the others
  are found before, or stand for bytes.
  """
  normal = {
      piece: i
      for i, (piece, kind) in enumerate(zip(tokenizer.pieces, tokenizer.types))
      if int(kind) == vocabulary.NORMAL
  }
  scores = tokenizer.scores.tolist()
  merges = []
  for piece, i in sorted(normal.items(), key=lambda kv: -scores[kv[1]]):
    for at in range(1, len(piece)):
      left, right = piece[:at], piece[at:]
      if left in normal and right in normal:
        merges.append([left, right])
  return merges
