"""Sources: what they hold, how they split, and that nothing leaks."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.data import sources
from gemma_qat.data import tokenizer


def _documents(count, seed=0, words=60):
  rng = np.random.default_rng(seed)
  return [
      sources.Document(
          f'd{i}', ' '.join(f'w{w}' for w in rng.integers(0, 10**6, words))
      )
      for i in range(count)
  ]


@pytest.fixture(scope='module')
def default_pair():
  return sources.load_pair('python_docs', 'topics')


def test_the_default_texts_share_nothing(default_pair):
  sources.check_disjoint(*default_pair)


def test_the_defaults_are_large_enough(default_pair):
  train, held_out = default_pair
  # The packages differ by version; the orders of magnitude do not.
  assert sum(len(d.text) for d in train) > 5_000_000
  assert sum(len(d.text) for d in held_out) > 300_000
  names = {d.name.split('/')[0] for d in train}
  assert {'python', 'numpy', 'jax'} <= names


def test_the_default_texts_are_distinct_and_long_enough(default_pair):
  for documents in default_pair:
    assert len({d.text for d in documents}) == len(documents)
    assert len({d.name for d in documents}) == len(documents)
    assert min(len(d.text) for d in documents) >= sources.MIN_CHARACTERS


def test_loading_is_repeatable_and_ordered_by_name():
  first, second = sources.load('topics'), sources.load('topics')
  assert first == second
  assert [d.name for d in first] == sorted(d.name for d in first)


def test_a_limit_takes_the_first_documents():
  some = sources.load('python_docs#limit=40')
  assert 1 < len(some) <= 40
  assert [d.name for d in some] == sorted(d.name for d in some)


def test_files_are_read_by_name_without_copies_and_scraps(tmp_path):
  for name, text in (
      ('b.txt', 'second ' * 50),
      ('a.txt', 'first ' * 50),
      ('c.txt', 'first ' * 50),
      ('d.txt', 'short'),
      ('e.md', 'other ' * 50),
  ):
    (tmp_path / name).write_text(text)
  loaded = sources.load(f'files:{tmp_path}/*.txt')
  assert [d.name.rsplit('/', 1)[1] for d in loaded] == ['a.txt', 'b.txt']
  both = sources.load(f'files:{tmp_path}/b.txt + files:{tmp_path}/e.md')
  assert [d.text[:5] for d in both] == ['secon', 'other']


def test_jsonl_reads_the_named_field(tmp_path):
  path = tmp_path / 'x.jsonl'
  records = [{'text': 'one ' * 60, 'body': f'body {i} ' * 60} for i in range(3)]
  path.write_text('\n\n'.join(map(json.dumps, records)))
  assert [d.text for d in sources.load(f'jsonl:{path}')] == ['one ' * 60]
  bodies = sources.load(f'jsonl:{path}#field=body&limit=2')
  assert [d.text for d in bodies] == [r['body'] for r in records[:2]]
  assert bodies[1].name == f'{path}:3'


def _write(path, *records):
  path.write_text('\n'.join(map(json.dumps, records)))
  return path


def _turns(*contents):
  roles = ('user', 'assistant') * len(contents)
  return {'messages': [
      {'role': r, 'content': c} for r, c in zip(roles, contents)
  ]}


def test_conversations_become_turns_of_control_tokens(tmp_path):
  path = _write(tmp_path / 'x.jsonl', _turns('Hi', 'Ho'), _turns('So?'))
  both = sources.load(f'chat:{path}')
  # Short as they are, they are whole.
  assert [d.name for d in both] == [f'{path}:1', f'{path}:2']
  tiny = tokenizer.tiny_tokenizer()
  start, end = 4, tiny.end_of_turn_id
  plain = lambda text: tiny.encode(text).tolist()
  assert sources.encode(both, tiny)[0].tolist() == [
      start, *plain('user\nHi'), end, *plain('\n'),
      start, *plain('model\nHo'), end, *plain('\n'),
  ]
  # The same text from elsewhere is these characters.
  same = _write(tmp_path / 'y.jsonl', {'text': both[0].text * 9})
  (document,) = sources.load(f'jsonl:{same}')
  assert end not in sources.encode([document], tiny)[0]


def test_sampled_text_comes_back_token_by_token(tmp_path):
  tiny = tokenizer.tiny_tokenizer()
  # 'the' letter by letter and a lone byte: no tokenizer reads so.
  pieces = ['<start_of_turn>', 't', 'h', 'e', '<0xE2>', '<end_of_turn>']
  ids = [tiny.pieces.index(p) for p in pieces]
  text = tiny.decode(ids, specials=True)
  path = _write(
      tmp_path / 'x.jsonl', {'text': text, 'gemma_tokens': ids},
      {'text': '', 'gemma_tokens': []}, {'text': 'plain ' * 50},
  )
  sampled, plain = sources.load(f'jsonl:{path}')
  assert sampled.text == '<start_of_turn>the\ufffd<end_of_turn>'
  found = sources.encode([plain, sampled], tiny)
  assert found[1].tolist() == ids
  np.testing.assert_array_equal(found[0], tiny.encode(plain.text))
  for wrong in (ids[:-1], [*ids[:-1], 512], ids[::-1]):
    bad = dataclasses.replace(sampled, tokens=np.array(wrong, np.int32))
    with pytest.raises(errors.UserError, match='x.jsonl:1 do not say'):
      sources.encode([bad], tiny)
  for wrong in (3, [1.5], [True], ['a'], [-1], [2**31], [[1]]):
    path = _write(tmp_path / 'y.jsonl', {'text': 't', 'gemma_tokens': wrong})
    with pytest.raises(errors.UserError, match='no list of token ids'):
      sources.load(f'jsonl:{path}')


def test_a_mixture_keeps_parts_and_weights(tmp_path):
  for name in 'abc':
    (tmp_path / f'{name}.txt').write_text(f'{name} says so ' * 30)
  part = lambda name: f'files:{tmp_path}/{name}.txt'
  source = f'0.7*{part("a")} + 3e-1 * {part("[bc]")}'
  assert sources.weights(source) == (0.7, 0.3)
  assert [d.part for d in sources.load(source)] == [0, 1, 1]
  assert sources.weights(f'{part("a")} + {part("b")}') is None
  for wrong, said in (
      (f'0.5*{part("a")} + {part("b")}', 'weights for some of its parts'),
      (f'0*{part("a")} + 1*{part("b")}', 'has the weight 0:'),
      (f'1.2.3*{part("a")}', 'has the weight 1.2.3'),
  ):
    with pytest.raises(errors.UserError, match=said):
      sources.load(wrong)


def test_a_mixture_is_split_and_disjoint_part_by_part(tmp_path):
  for i, document in enumerate(_documents(80)):
    folder = tmp_path / ('large' if i < 50 else 'small')
    folder.mkdir(exist_ok=True)
    (folder / f'{document.name}.txt').write_text(document.text)
  source = f'1*files:{tmp_path}/large/* + 9*files:{tmp_path}/small/*'
  train, held_out = sources.load_pair(source, source, fraction=0.3)
  assert len(train) + len(held_out) == 80
  for side in (train, held_out):
    assert {d.part for d in side} == {0, 1}
  train, _ = sources.load_pair(source, f'files:{tmp_path}/small/*')
  assert {d.part for d in train} == {0}


def test_a_conversation_that_shares_text_is_left_out_whole(tmp_path):
  shared, other = (d.text for d in _documents(2))
  turns = _write(
      tmp_path / 'x.jsonl', _turns('Why?\n\n' + shared, 'So.'),
      _turns('Why?', other),
  )
  held = _write(tmp_path / 'held.jsonl', {'text': shared})
  train, _ = sources.load_pair(f'chat:{turns}', f'jsonl:{held}')
  assert [d.name for d in train] == [f'{turns}:2']


def test_wrong_sources_are_user_errors(tmp_path):
  bad = tmp_path / 'bad.jsonl'
  bad.write_text(json.dumps({'text': 'x' * 300}) + '\n{"text": \n')
  deep = tmp_path / 'deep.jsonl'
  deep.write_text('[' * 100_000)
  number = tmp_path / 'number.jsonl'
  number.write_text('{"text": 3}\n')
  binary = tmp_path / 'binary.txt'
  binary.write_bytes(b'\xff\xfe\x80' * 100)
  for source, said in (
      ('wikipedia', 'Unknown text source'),
      ('files:', 'Unknown text source'),
      (f'files:{tmp_path}/*.none', 'No file matches'),
      (f'files:{binary}', 'binary.txt as UTF-8'),
      (f'jsonl:{tmp_path}/none', 'Cannot read'),
      (f'jsonl:{binary}', 'Cannot read'),
      (f'jsonl:{bad}', 'line 2: not JSON'),
      (f'jsonl:{deep}', 'line 1: not JSON'),
      (f'jsonl:{bad}#field=body', "no text field 'body'"),
      (f'jsonl:{number}', "no text field 'text'"),
      (f'jsonl:{bad}#feild=body', "no option 'feild'"),
      (f'jsonl:{bad}#limit=many', 'whole number'),
      ('topics#limit=0', 'no document'),
  ):
    with pytest.raises(errors.UserError, match=said):
      sources.load(source)


@pytest.mark.skipif(
    importlib.util.find_spec('datasets') is not None,
    reason='the package datasets is installed',
)
def test_the_hub_without_its_package_is_a_user_error():
  with pytest.raises(errors.UserError, match='needs the package datasets'):
    sources.load('hf:some/name')


def test_the_hub_reader_reads_fields_splits_and_limits(tmp_path):
  pytest.importorskip('datasets')
  folder = tmp_path / 'set'
  folder.mkdir()
  for part in ('train', 'test'):
    lines = [json.dumps({'body': f'{part} {i} ' * 60}) for i in range(4)]
    (folder / f'{part}.jsonl').write_text('\n'.join(lines))
  test = sources.load(f'hf:{folder}:test#field=body')
  assert [d.text for d in test] == [f'test {i} ' * 60 for i in range(4)]
  train = sources.load(f'hf:{folder}#field=body&limit=2')
  assert [d.text for d in train] == [f'train {i} ' * 60 for i in range(2)]
  with pytest.raises(errors.UserError, match='Cannot load split'):
    sources.load(f'hf:{folder}:none#field=body')


def test_a_split_takes_each_document_once_and_about_the_fraction():
  documents = _documents(2000)
  train, held_out = sources.split(documents, 0.1, seed=1)
  assert sorted(d.name for d in train + held_out) == sorted(
      d.name for d in documents
  )
  # Binomial: 200 +- 13.
  assert 140 < len(held_out) < 260
  _, other = sources.split(documents, 0.1, seed=2)
  assert held_out != other


def test_a_split_does_not_depend_on_the_other_documents():
  documents = _documents(300)
  _, held_out = sources.split(documents, 0.3)
  _, of_half = sources.split(documents[::2], 0.3)
  assert of_half == [d for d in documents[::2] if d in held_out]


def test_copies_fall_on_the_same_side():
  documents = _documents(100)
  copies = [
      sources.Document('copy', d.text.replace(' ', '\n')) for d in documents
  ]
  _, held_out = sources.split(documents, 0.5)
  _, of_copies = sources.split(copies, 0.5)
  assert [d.text.split() for d in of_copies] == [
      d.text.split() for d in held_out
  ]


def test_a_shared_span_is_found_whatever_its_whitespace():
  train, held_out = _documents(5), _documents(5, seed=1)
  sources.check_disjoint(train, held_out)
  span = held_out[3].text[50:270].replace(' ', ' \n  ')
  leaked = sources.Document('leaked', train[2].text + span + 'more')
  with pytest.raises(errors.UserError, match="'leaked' shares text"):
    sources.check_disjoint([*train, leaked], held_out)


def test_a_shared_short_document_is_found():
  short = [sources.Document('short', 'to be or not to be')]
  with pytest.raises(errors.UserError, match="'short' shares text"):
    sources.check_disjoint(short, _documents(1) + short)


def test_a_pair_of_one_source_is_split_and_disjoint(tmp_path):
  for document in _documents(60):
    (tmp_path / f'{document.name}.txt').write_text(document.text)
  source = f'files:{tmp_path}/*.txt'
  train, held_out = sources.load_pair(source, source, fraction=0.3)
  assert len(train) + len(held_out) == 60 and held_out
  sources.check_disjoint(train, held_out)


def test_a_pair_that_shares_everything_is_a_user_error(tmp_path):
  (tmp_path / 'a.txt').write_text(_documents(1)[0].text)
  with pytest.raises(errors.UserError, match='0 training and 1 held-out'):
    sources.load_pair(f'files:{tmp_path}/*', f'files:{tmp_path}/a.txt')


def test_measure_counts_what_encoding_gives():
  documents = _documents(3)
  tiny = tokenizer.tiny_tokenizer()
  size = sources.measure(documents, tiny)
  assert size.documents == 3
  assert size.characters == sum(len(d.text) for d in documents)
  assert size.tokens == sum(len(tiny.encode(d.text)) for d in documents)
