"""The pipeline: every token once an epoch, any shards, exact restarts."""

import itertools
import json

import numpy as np
from orbax.checkpoint.experimental import v1 as ocp
import pytest

from gemma_qat import errors
from gemma_qat.data import pipeline
from gemma_qat.data import sources
from gemma_qat.data import tokenizer

LENGTH = 16


@pytest.fixture(scope='module')
def tiny():
  return tokenizer.tiny_tokenizer()


@pytest.fixture(scope='module')
def documents():
  return [
      sources.Document(f'd{i}', f'Document {i} says: ' + 'word ' * (5 + 7 * i))
      for i in range(12)
  ]


def _take(iterator, count):
  return [
      {k: np.array(v) for k, v in element.items()}
      for element in itertools.islice(iterator, count)
  ]


def _assert_equal(left, right):
  assert len(left) == len(right) > 0
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def test_batches_have_the_promised_shapes(documents, tiny):
  (batch,) = _take(pipeline.make_dataset(documents, tiny, 4, LENGTH, 0), 1)
  assert batch['tokens'].shape == batch['mask'].shape == (4, LENGTH)
  assert batch['tokens'].dtype == np.int32 and batch['mask'].dtype == bool
  assert (batch['tokens'][:, 0] == tiny.bos_id).all()
  assert (batch['tokens'][:, 1] != tiny.bos_id).all()


def test_the_mask_leaves_out_bos_and_padding_only(documents, tiny):
  for batch in pipeline.one_epoch(documents, tiny, 4, LENGTH):
    special = np.isin(batch['tokens'], [tiny.bos_id, tiny.pad_id])
    np.testing.assert_array_equal(batch['mask'], ~special)


def test_one_epoch_holds_every_token_once_in_order(documents, tiny):
  batches = list(pipeline.one_epoch(documents, tiny, 4, LENGTH))
  assert all(b['tokens'].shape == (4, LENGTH) for b in batches)
  tokens = np.concatenate([b['tokens'][b['mask']] for b in batches])
  expected = np.concatenate([tiny.encode(d.text) for d in documents])
  np.testing.assert_array_equal(tokens, expected)


def test_documents_are_separated_by_bos(documents, tiny):
  (row,) = pipeline.one_epoch(documents[:2], tiny, 1, 400)
  tokens = row['tokens'][0]
  (marks,) = np.nonzero(tokens == tiny.bos_id)
  assert marks.tolist() == [0, 1 + len(tiny.encode(documents[0].text))]


def test_each_epoch_holds_all_rows_in_another_order(documents, tiny):
  batches = pipeline.one_epoch(documents, tiny, 1, LENGTH)
  rows = [b['tokens'][0] for b in batches]
  iterator = pipeline.make_dataset(documents, tiny, 1, LENGTH, 0)
  epochs = [
      [b['tokens'][0].tobytes() for b in _take(iterator, len(rows))]
      for _ in range(3)
  ]
  for epoch in epochs:
    assert sorted(epoch) == sorted(r.tobytes() for r in rows)
  assert len({tuple(e) for e in epochs}) == 3


def test_the_seed_alone_decides_the_order(documents, tiny):
  def batches(seed):
    return _take(pipeline.make_dataset(documents, tiny, 4, LENGTH, seed), 5)

  _assert_equal(batches(1), batches(1))
  with pytest.raises(AssertionError):
    _assert_equal(batches(1), batches(2))


@pytest.mark.parametrize('shard_count', [2, 4])
def test_shards_together_hold_the_global_batches(documents, tiny, shard_count):
  whole = _take(pipeline.make_dataset(documents, tiny, 4, LENGTH, 0), 40)
  shards = [
      _take(
          pipeline.make_dataset(
              documents, tiny, 4, LENGTH, 0,
              shard_index=i, shard_count=shard_count,
          ),
          40,
      )
      for i in range(shard_count)
  ]
  for step, batch in enumerate(whole):
    parts = np.concatenate([s[step]['tokens'] for s in shards])
    assert sorted(map(bytes, parts)) == sorted(map(bytes, batch['tokens']))


def test_a_state_through_json_continues_bit_for_bit(documents, tiny):
  iterator = pipeline.make_dataset(documents, tiny, 4, LENGTH, 0)
  _take(iterator, 13)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = _take(iterator, 30)
  resumed = pipeline.make_dataset(documents, tiny, 4, LENGTH, 0)
  resumed.set_state(state)
  _assert_equal(_take(resumed, 30), expected)
  # The same iterator can also go back.
  iterator.set_state(state)
  _assert_equal(_take(iterator, 30), expected)


def test_a_state_holds_for_another_number_of_shards(documents, tiny):
  iterator = pipeline.make_dataset(documents, tiny, 4, LENGTH, 0)
  _take(iterator, 13)
  state = iterator.get_state()
  (batch,) = _take(iterator, 1)
  parts = []
  for i in range(2):
    shard = pipeline.make_dataset(
        documents, tiny, 4, LENGTH, 0, shard_index=i, shard_count=2
    )
    shard.set_state(state)
    parts.append(_take(shard, 1)[0]['tokens'])
  assert sorted(map(bytes, np.concatenate(parts))) == sorted(
      map(bytes, batch['tokens'])
  )


def test_orbax_saves_and_restores_the_iterator(documents, tiny, tmp_path):
  iterator = pipeline.make_dataset(documents, tiny, 4, LENGTH, 0)
  _take(iterator, 7)
  ocp.save_checkpointables(tmp_path / 'step_7', {'data': iterator})
  expected = _take(iterator, 9)
  resumed = pipeline.make_dataset(documents, tiny, 4, LENGTH, 0)
  ocp.load_checkpointables(tmp_path / 'step_7', {'data': resumed})
  _assert_equal(_take(resumed, 9), expected)


@pytest.fixture(scope='module')
def mixture():
  """A long and a short part; a row's last tokens tell which it is from."""
  make = lambda name, count, part: [
      sources.Document(f'{name}{i}', f'{name * 3}{i:03} ' * 40, part=part)
      for i in range(count)
  ]
  return make('a', 30, 0) + make('b', 3, 1)


def _share(tiny, batches, letter='b'):
  rows = np.concatenate([b['tokens'] for b in batches])
  return np.mean([letter in tiny.decode(row) for row in rows])


@pytest.mark.parametrize('weights', [(0.75, 0.25), (1, 3)], ids=str)
def test_rows_of_a_mixture_come_in_its_proportions(mixture, tiny, weights):
  batches = _take(pipeline.make_dataset(
      mixture, tiny, 4, LENGTH, 0, weights=weights
  ), 100)
  share = _share(tiny, batches)
  assert abs(share - weights[1] / sum(weights)) < 0.01
  # All along, not on average alone, and whole epochs of the short part.
  assert abs(_share(tiny, batches[:8]) - share) < 0.05
  rows = [r.tobytes() for b in batches for r in b['tokens']]
  short = pipeline.one_epoch(mixture[30:], tiny, 1, LENGTH)
  assert {b['tokens'][0].tobytes() for b in short} <= set(rows)


def test_a_mixture_goes_on_from_its_state_on_any_shards(mixture, tiny):
  make = lambda **shard: pipeline.make_dataset(
      mixture, tiny, 4, LENGTH, 0, weights=(0.7, 0.3), **shard
  )
  iterator = make()
  _take(iterator, 13)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = _take(iterator, 30)
  resumed = make()
  resumed.set_state(state)
  _assert_equal(_take(resumed, 30), expected)
  shards = [make(shard_index=i, shard_count=2) for i in range(2)]
  for shard in shards:
    shard.set_state(state)
  parts = [_take(shard, 30) for shard in shards]
  for whole, *some in zip(expected, *parts, strict=True):
    rows = np.concatenate([s['tokens'] for s in some])
    assert sorted(map(bytes, rows)) == sorted(map(bytes, whole['tokens']))


def test_a_part_of_a_mixture_without_a_row_is_a_user_error(mixture, tiny):
  with pytest.raises(errors.UserError, match='Part 2 of the mixed text fills'):
    pipeline.make_dataset(mixture[:30], tiny, 4, LENGTH, 0, weights=(1, 1))


def test_tokens_that_documents_bring_are_read_and_cached(tiny, tmp_path):
  the = [tiny.pieces.index(p) for p in 'the']
  make = lambda **fields: [sources.Document('d', 'the', **fields)]
  kinds = [
      make(), make(tokens=np.array(the, np.int32)), make(has_controls=True)
  ]
  assert len({pipeline.digest(some, tiny) for some in kinds}) == 3
  for _ in range(2):
    read = [pipeline.tokenize(some, tiny, tmp_path) for some in kinds]
    assert read[1].tolist() == [tiny.bos_id, *the]
    assert read[0].tolist() == [tiny.bos_id, *tiny.encode('the')]


def test_the_cache_gives_the_same_tokens(documents, tiny, tmp_path):
  calls = []

  def tokens():
    return pipeline.tokenize(
        documents, tiny, tmp_path / 'new', lambda *done: calls.append(done)
    )

  first = tokens()
  assert calls == [(12, 12)]
  np.testing.assert_array_equal(first, tokens())
  assert calls == [(12, 12)], 'the cache was not used'
  (path,) = (tmp_path / 'new').iterdir()
  path.write_bytes(path.read_bytes()[:200])
  np.testing.assert_array_equal(first, tokens())
  assert len(calls) == 2, 'a damaged cache must be made again'


def test_the_digest_sees_text_vocabulary_and_borders(documents, tiny):
  def digest(*texts, vocabulary=tiny):
    return pipeline.digest(
        [sources.Document('', t) for t in texts], vocabulary
    )

  other = tokenizer.tiny_tokenizer(400)
  digests = {
      digest('ab', 'c'),
      digest('a', 'bc'),
      digest('abc'),
      digest('ab', 'c', vocabulary=other),
  }
  assert len(digests) == 4


def test_too_little_text_and_wrong_sizes_are_user_errors(documents, tiny):
  for arguments, said in (
      ((documents[:1], tiny, 64, LENGTH, 0), 'fewer than one batch of 64'),
      (([], tiny, 1, LENGTH, 0), 'fills 0 rows'),
      ((documents, tiny, 4, 1, 0), 'no text beside BOS'),
  ):
    with pytest.raises(errors.UserError, match=said):
      pipeline.make_dataset(*arguments)
  for shards in ({'shard_count': 3}, {'shard_count': 2, 'shard_index': 2}):
    with pytest.raises(errors.UserError, match='cannot be divided'):
      pipeline.make_dataset(documents, tiny, 4, LENGTH, 0, **shards)


def test_an_unwritable_cache_is_a_user_error(documents, tiny, tmp_path):
  (tmp_path / 'file').write_text('in the way')
  with pytest.raises(errors.UserError, match='Cannot write the token cache'):
    pipeline.tokenize(documents, tiny, tmp_path / 'file')
