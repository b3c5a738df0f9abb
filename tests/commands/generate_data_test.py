"""A model writes a file, whatever interrupts it; training reads it."""

import json
import shutil

import numpy as np
import pytest

from gemma_qat import __main__ as cli
from gemma_qat import errors
from gemma_qat.checkpoints import detect
from gemma_qat.commands import config_flags
from gemma_qat.data import sources
from gemma_qat.training import text as text_lib
from tests import terminating
from tests.commands import conftest

_FLAGS = ['--length=40', '--batch_size=8', '--dtype=float32']


def _generate(model, path, *flags):
  argv = ['generate-data', str(model), f'--to={path}', *_FLAGS, *flags]
  return cli.main(argv)


def _records(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def tokenizer(one_layer):
  return detect.load(one_layer).tokenizer


@pytest.fixture(scope='module')
def whole(one_layer, tmp_path_factory):
  """20 documents, written at one go: two batches and a half."""
  path = tmp_path_factory.mktemp('data') / 'whole.jsonl'
  assert _generate(one_layer, path, '--documents=20') == 0
  return path


def test_documents_are_as_many_and_as_long_as_asked(whole, tokenizer):
  records = _records(whole)
  assert len(records) == 20
  assert len({r['text'] for r in records}) > 15
  for record in records:
    ids = record['gemma_tokens']
    assert len(ids) <= 39 and max(ids, default=0) < tokenizer.vocab_size
    assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids


def test_the_very_tokens_are_read_again(whole, tokenizer):
  documents = sources.load(f'jsonl:{whole}')
  read = sources.encode(documents, tokenizer)
  written = [r['gemma_tokens'] for r in _records(whole) if r['text']]
  assert [ids.tolist() for ids in read] == written


@pytest.mark.parametrize('lines, torn', [(11, 9), (8, 0), (0, 0)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    whole, one_layer, tmp_path, lines, torn
):
  path = _begun(whole, tmp_path / 'again.jsonl', lines, torn)
  assert _generate(one_layer, path, '--documents=20') == 0
  assert path.read_bytes() == whole.read_bytes()


def test_more_may_be_asked_of_a_file_and_is_what_follows(
    whole, one_layer, tmp_path, capsys
):
  path = tmp_path / 'x.jsonl'
  lines = whole.read_bytes().splitlines(keepends=True)
  counts = np.cumsum([len(json.loads(l)['gemma_tokens']) for l in lines])
  # The document that makes it enough is the last.
  assert _generate(one_layer, path, f'--tokens={counts[9] - 1}') == 0
  assert path.read_bytes() == b''.join(lines[:10])
  assert _generate(one_layer, path, '--documents=13') == 0
  assert path.read_bytes() == b''.join(lines[:13])
  assert _generate(one_layer, path, '--tokens=1e1') == 0
  assert path.read_bytes() == b''.join(lines[:13])
  assert '13 documents' in capsys.readouterr().out


def test_a_file_of_other_settings_is_refused(whole, one_layer, capsys):
  before = whole.read_bytes()
  assert _generate(one_layer, whole, '--documents=30', '--seed=1') == 2
  assert 'seed was 0, now 1' in capsys.readouterr().err
  assert whole.read_bytes() == before


def test_sigterm_stops_after_what_is_written(whole, one_layer, tmp_path):
  path = _begun(whole, tmp_path / 'x.jsonl', lines=8)
  begun = path.stat().st_size
  with terminating.terminated_when(lambda: path.stat().st_size > begun):
    code = _generate(one_layer, path, '--tokens=1e9')
  assert code == errors.Stopped.exit_code
  lines = path.read_bytes().splitlines(keepends=True)
  assert len(lines) > 8 and len(lines) % 8 == 0
  assert lines[:20] == whole.read_bytes().splitlines(keepends=True)[:len(lines)]


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
  path = tmp_path_factory.mktemp('prompts') / 'prompts.jsonl'
  texts = ['Why?', 'Say what the function returns, and how', 'value ' * 100]
  path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  return path


def test_a_chat_begins_with_the_prompt_in_its_turn(
    prompts, one_layer, tokenizer, tmp_path
):
  path = tmp_path / 'x.jsonl'
  # Six documents of three prompts, in their order.
  assert _generate(
      one_layer, path, f'--prompts={prompts}', '--chat', '--documents=6'
  ) == 0
  records = _records(path)
  start = '<start_of_turn>user\n'
  answer = '<end_of_turn>\n<start_of_turn>model\n'
  for record, said in zip(records, ['Why?', 'Say what', 'value value'] * 2):
    text = record['text']
    assert text.startswith(start + said) and answer in text
    given = tokenizer.encode(text[: text.index(answer) + len(answer)],
                             specials=True)
    assert record['gemma_tokens'][: len(given)] == given.tolist()
    assert len(record['gemma_tokens']) > len(given)
  assert records[0]['text'] != records[3]['text']
  assert records[2]['text'].count('value') < 20


def test_prompts_alone_begin_a_text_one_document_each(
    prompts, one_layer, tokenizer, tmp_path
):
  path = tmp_path / 'x.jsonl'
  assert _generate(one_layer, path, f'--prompts={prompts}#field=text') == 0
  records = _records(path)
  assert len(records) == 3
  assert [r['text'][:4] for r in records] == ['Why?', 'Say ', 'valu']
  assert records[0]['gemma_tokens'][:2] == tokenizer.encode('Why?')[:2].tolist()


def test_a_chat_may_be_made_up_whole(one_layer, tokenizer, tmp_path):
  path = tmp_path / 'x.jsonl'
  assert _generate(
      one_layer, path, '--chat', '--documents=16', '--length=300'
  ) == 0
  texts = [r['text'] for r in _records(path)]
  assert all(text.startswith('<start_of_turn>user\n') for text in texts)
  answer = '<end_of_turn>\n<start_of_turn>model\n'
  turned = [text for text in texts if '<end_of_turn>' in text]
  assert turned and all(
      text.split('<end_of_turn>', 1)[1].startswith(answer[13:])
      for text in turned
  )
  documents = sources.load(f'jsonl:{path}')
  read = sources.encode(documents, tokenizer)
  assert [r['gemma_tokens'] for r in _records(path)] == [
      ids.tolist() for ids in read
  ]


def test_training_reads_it_in_a_mixture(whole, one_layer, texts, tmp_path):
  config = config_flags.load(f'{conftest.CONFIG}:tiny', [
      *texts, f'--config.model.checkpoint={one_layer}',
  ])
  plain = config.data.train
  with config.unlocked():
    config.data.train = f'0.5*{plain} + 0.5*jsonl:{whole}'
    config.train.batch_size, config.train.length = 4, 16
  base = detect.load(one_layer)
  text = text_lib.read(config, base, tmp_path)
  ours = {
      tuple(r['gemma_tokens'][i : i + 8])
      for r in _records(whole) for i in range(32)
  }
  rows = np.concatenate([next(text.batches)['tokens'] for _ in range(20)])
  count = sum(
      any(tuple(row[i : i + 8]) in ours for i in (1, 4, 8)) for row in
      rows.tolist()
  )
  assert 30 <= count <= 50
  assert text.heldout


@pytest.mark.parametrize('flags, words', [
    ([], ['--tokens', '--documents']),
    (['--documents=0'], ["'0'"]),
    (['--tokens=some'], ["'some'", '1e6']),
    (['--documents=4', '--batch_size=6'], ['batch_size=6', '8 devices']),
    (['--documents=4', '--length=1'], ['--length=1']),
    (['--documents=4', '--length=1000000'], ['1000000', 'most']),
    (['--documents=4', '--temperature=-1'], ['--temperature']),
    (['--documents=4', '--top_p=0'], ['--top_p=0']),
    (['--documents=4', '--prompts=files:none'], ['files:GLOB']),
    (['--documents=4', '--prompts=topics#limit=2', '--chat', '--length=9'],
     ['--length=9', 'room']),
    (['--documents=4', '--chat', '--length=5'], ['--length=5', 'room']),
], ids=str)
def test_mistakes_are_said_in_one_line(
    one_layer, tmp_path, capsys, flags, words
):
  assert _generate(one_layer, tmp_path / 'x.jsonl', *flags) == 2
  said = capsys.readouterr().err.strip()
  assert '\n' not in said
  assert all(word in said for word in words), said
  assert not list(tmp_path.iterdir())


def test_a_file_of_something_else_is_left_alone(one_layer, whole, tmp_path,
                                                capsys):
  path = tmp_path / 'x.jsonl'
  path.write_text('mine\n')
  assert _generate(one_layer, path, '--documents=4') == 2
  assert 'not begun by this command' in capsys.readouterr().err
  shutil.copy(f'{whole}.json', f'{path}.json')
  assert _generate(one_layer, path, '--documents=4') == 2
  assert 'line 1, is not as it was written' in capsys.readouterr().err
  assert path.read_text() == 'mine\n'


def _begun(whole, path, lines, torn=0):
  """A copy of the file as it stood after some lines and a piece of one."""
  data = whole.read_bytes().splitlines(keepends=True)
  path.write_bytes(b''.join(data[:lines]) + data[lines][:torn])
  shutil.copy(f'{whole}.json', f'{path}.json')
  return path
