"""Every form in which a tokenizer is written encodes text the same way."""

import dataclasses
import json
import random

import pytest

from gemma_qat.checkpoints import huggingface_tokenizer
from gemma_qat.checkpoints import tokenizer_out
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.data import vocabulary

_PARTS = (
    ' ', '  ', '    ', '\n', '\n\n', '\r\n', '\t', 'the', 'of', 'a', 'e', 'aa',
    'return', 'Type', '1', '23', '-', '--', '=', '.', '...', '<b>', '</b>', '<',
    '\u00e9', '\u4e16\u754c', '\U0001f600', '\U0001f469\u200d\U0001f467',
    '\u2581', '<0x41>', '\x00', '\u00a0',
)
_SPECIAL = ('<bos>', '<start_of_turn>', '<end_of_turn>', '<eos>', '<pad>')


@pytest.fixture
def chat(tiny):
  return dataclasses.replace(tiny.tokenizer, chat_template='{{ bos_token }}')


def _random_texts(parts, count=2000):
  rng = random.Random(0)
  for _ in range(count):
    yield ''.join(rng.choices(parts, k=rng.randint(1, 40)))
  for part in parts:
    for length in range(1, 40):
      yield part * length


def _fast(folder):
  package = pytest.importorskip('tokenizers')
  return package.Tokenizer.from_file(str(folder / 'tokenizer.json'))


def test_the_tokenizers_package_gives_the_same_ids(chat, tmp_path):
  tokenizer_out.save(chat, tmp_path)
  fast = _fast(tmp_path)
  assert fast.get_vocab_size() == chat.vocab_size
  for text in _random_texts(_PARTS):
    ids = fast.encode(text, add_special_tokens=False).ids
    assert ids == chat.encode(text).tolist(), text


def test_special_tokens_in_text_are_the_same_too(chat, tmp_path):
  tokenizer_out.save(chat, tmp_path)
  fast = _fast(tmp_path)
  for text in _random_texts(_PARTS + _SPECIAL):
    ids = fast.encode(text).ids
    assert ids == chat.encode(text, bos=True, specials=True).tolist(), text


def test_ids_become_the_text_again(chat, tmp_path):
  tokenizer_out.save(chat, tmp_path)
  fast = _fast(tmp_path)
  for text in _random_texts([p for p in _PARTS if p != '\u2581'], 300):
    assert fast.decode(chat.encode(text).tolist()) == text


def test_merges_follow_scores_not_ids(tiny, tmp_path):
  """The same pieces, the later merges first: other ids, still the same."""
  known = tiny.tokenizer
  scores = -known.scores
  other = tokenizers.from_pieces(known.pieces, scores, known.types)
  text = 'the theory of the others'
  assert other.encode(text).tolist() != known.encode(text).tolist()
  tokenizer_out.save(other, tmp_path)
  fast = _fast(tmp_path)
  for text in _random_texts(('the', 'or', 'y', ' ', 'n', 'er', 'a', 'in'), 500):
    ids = fast.encode(text, add_special_tokens=False).ids
    assert ids == other.encode(text).tolist(), text


def test_our_reader_takes_tokenizer_json_alone(chat, tmp_path):
  tokenizer_out.save(chat, tmp_path)
  (tmp_path / 'tokenizer.model').unlink()
  loaded = huggingface_tokenizer.load(tmp_path)
  assert loaded.digest == chat.digest
  assert loaded.chat_template == chat.chat_template
  for text in _random_texts(_PARTS, 200):
    assert loaded.encode(text).tolist() == chat.encode(text).tolist()


def test_image_tokens_stand_behind_a_vocabulary_that_lacks_them(
    chat, tmp_path
):
  tokenizer_out.save(chat, tmp_path, images=True)
  ids = tokenizer_out.image_ids(chat)
  assert ids == {'boi_token': 512, 'eoi_token': 513, 'image_token': 514}
  settings = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  beside = json.loads((tmp_path / 'added_tokens.json').read_text())
  for name, i in ids.items():
    piece = settings[name]
    assert settings['added_tokens_decoder'][str(i)]['content'] == piece
    assert beside[piece] == i
  # Behind it, where readers cut by the embedding's rows.
  assert huggingface_tokenizer.load(tmp_path).pieces[:512] == chat.pieces
  text = '1<start_of_image><image_soft_token><end_of_image>\n\n'
  found = _fast(tmp_path).encode(text).ids
  assert found[2:-1] == [512, 514, 513]


def test_image_tokens_in_the_vocabulary_keep_their_ids(chat):
  pieces = list(chat.pieces)
  pieces[-1] = '<start_of_image>'
  types = chat.types.copy()
  types[-1] = vocabulary.USER_DEFINED
  seeing = tokenizers.from_pieces(pieces, chat.scores, types)
  assert tokenizer_out.image_ids(seeing) == {
      'boi_token': 511, 'eoi_token': 512, 'image_token': 513,
  }
  assert tokenizer_out.image_ids(None) == {
      'boi_token': 255_999, 'eoi_token': 256_000, 'image_token': 262_144,
  }
