"""Each form of a tokenizer in a folder encodes text the same way."""

import dataclasses
import json

import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import huggingface_tokenizer
from gemma_qat.checkpoints import tokenizer_out
from gemma_qat.data import vocabulary

TEXT = 'The  value of\n\n    the object: \u00e9\u4e16 <end_of_turn>\t1234'


def test_tokenizer_model_comes_back(tiny, tmp_path):
  chat = dataclasses.replace(
      tiny.tokenizer, chat_template='{{ bos_token }}', eos_id=5
  )
  tokenizer_out.save(chat, tmp_path)
  loaded = huggingface_tokenizer.load(tmp_path)
  assert loaded.digest == chat.digest
  assert loaded.eos_id == 5
  assert loaded.chat_template == '{{ bos_token }}'


def test_every_special_token_is_declared(tiny, tmp_path):
  tokenizer_out.save(tiny.tokenizer, tmp_path)
  settings = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  added = settings['added_tokens_decoder']
  special = {int(i) for i, t in added.items() if t['special']}
  types = tiny.tokenizer.types
  assert special == set((types == vocabulary.CONTROL).nonzero()[0])
  assert len(added) == len(special) + sum(types == vocabulary.USER_DEFINED)


def test_tokenizer_json_alone_encodes_the_same(tiny, tmp_path):
  (tmp_path / 'tokenizer.json').write_text(
      json.dumps(_fast(tiny.tokenizer)), encoding='utf-8'
  )
  loaded = huggingface_tokenizer.load(tmp_path)
  assert loaded.digest == tiny.tokenizer.digest
  assert loaded.encode(TEXT).tolist() == tiny.tokenizer.encode(TEXT).tolist()


def test_instruction_tuned_models_end_with_their_turn(tiny, tmp_path):
  tokenizer_out.save(tiny.tokenizer, tmp_path)
  (tmp_path / 'config.json').write_text('{"eos_token_id": [1, 5]}')
  assert tiny.tokenizer.end_of_turn_id == 5
  assert huggingface_tokenizer.load(tmp_path).eos_id == 5


def test_other_tokenizers_are_refused(tiny, tmp_path):
  contents = _fast(tiny.tokenizer)
  contents['model']['type'] = 'Unigram'
  (tmp_path / 'tokenizer.json').write_text(json.dumps(contents))
  with pytest.raises(errors.UserError, match='tokenizer.json'):
    huggingface_tokenizer.load(tmp_path)


def test_a_folder_without_tokenizer_gives_none(tmp_path):
  assert huggingface_tokenizer.load(tmp_path) is None


def _fast(tokenizer):
  """A tokenizer.json as Hugging Face lays it out."""
  vocab = {p: i for i, p in enumerate(tokenizer.pieces)}
  added = [
      {
          'id': i,
          'content': piece.replace(' ', '\u2581'),
          'special': int(kind) == vocabulary.CONTROL,
      }
      for i, (piece, kind) in enumerate(zip(tokenizer.pieces, tokenizer.types))
      if kind in (vocabulary.CONTROL, vocabulary.USER_DEFINED)
  ]
  vocab = {p.replace(' ', '\u2581'): i for p, i in vocab.items()}
  return {
      'added_tokens': added,
      'model': {'type': 'BPE', 'byte_fallback': True, 'vocab': vocab},
  }
