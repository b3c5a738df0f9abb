"""What differs is found, and named as it is."""

import math
import re

import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from gemma_qat.checkpoints import orbax_files
from gemma_qat.training import sameness

_STACK = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def _tree(**changes):
  student = {
      'codes': np.arange(-4, 4, dtype=np.int8),
      'norm': jnp.ones(3, jnp.bfloat16), 'stack': _STACK,
  }
  return student | changes


@pytest.fixture
def save(tmp_path):
  """Saves a step with a given student; returns its folder."""
  def save(name, student, text='a'):
    with orbax_files.context():
      ocp.save_checkpointables(tmp_path / name, {
          'student': student, 'optimizer': {'0000': jnp.int32(8)},
          'manifest': {'version': 1, 'text': text},
      })
    return tmp_path / name
  return save


def test_equal_steps_are_the_same(save):
  found = sameness.compare_steps(save('1', _tree()), save('2', _tree()))
  assert found == (True, '4 arrays, 36 values')


def test_the_first_array_that_differs_is_measured(save):
  changed = _STACK.copy()
  changed[1, 2, 3] += 0.5
  changed[0, 0, 1] = np.nextafter(np.float32(1), np.float32(2))
  other = _tree(stack=changed, norm=jnp.full(3, -1, jnp.bfloat16))
  found = sameness.compare_steps(save('1', _tree()), save('2', other, 'b'))
  assert found == (
      False, 'student/norm: 3 of 3 values differ, by 2 at most; 2 of 4 arrays '
      'differ; the training text is not what it was',
  )
  other = _tree(stack=changed)
  found = sameness.compare_steps(save('3', _tree()), save('4', other))
  assert 'student/stack: 2 of 24 values differ, by 0.5 at most' in found.said


def test_signs_of_zero_and_nans_are_told_apart(save):
  one = _tree(norm=np.array([0.0, np.nan], np.float32))
  same = sameness.compare_steps(save('1', one), save('2', one))
  assert same.is_same
  found = sameness.compare_steps(
      save('3', one), save('4', _tree(norm=np.array([-0.0, np.nan], 'f4')))
  )
  assert 'student/norm: 1 of 2 values differ, by 0 at most' in found.said
  found = sameness.compare_steps(
      save('5', one), save('6', _tree(norm=np.array([np.nan] * 2, 'f4')))
  )
  assert '1 of 2 values differ, by nan at most' in found.said


@pytest.mark.parametrize('changes, word', [
    ({'norm': np.ones(3, np.float32)},
     r'student/norm was bfloat16 \[3\], now float32 \[3\]'),
    ({'stack': _STACK[:1]}, r'now float32 \[1, 3, 4\]'),
    ({'new': np.ones(2)}, r'student/new was not there, now float64 \[2\]'),
])
def test_another_kind_of_array_is_named(save, changes, word):
  found = sameness.compare_steps(save('1', _tree()), save('2', _tree(**changes)))
  assert not found.is_same
  assert re.search(word, found.said), found.said


_ROWS = [
    {'step': 0, 'heldout_kl_nats': 0.5},
    {'step': 2, 'kl_nats': math.nan, 'loss': 1.0, 'tokens_per_second': 3.0},
]


def test_metrics_that_measure_time_may_differ():
  other = [_ROWS[0], _ROWS[1] | {'tokens_per_second': 4.0, 'mfu': 1.0,
                                 'save_seconds': 2.0}]
  found = sameness.compare_metrics(_ROWS, other)
  assert found == (True, '2 rows, 5 values')


@pytest.mark.parametrize('other, word', [
    ([_ROWS[0], _ROWS[1] | {'loss': 1.0000001}],
     'row 2 (step 2): loss was 1.0, now 1.0000001'),
    ([_ROWS[0], _ROWS[1] | {'more': 1.0}],
     'row 2 (step 2): more was not there, now 1.0'),
    ([_ROWS[0] | {'step': 1}, _ROWS[1]], 'row 1 (step 0): step was 0, now 1'),
    (_ROWS[:1], 'there were 2 rows, now 1'),
    ([*_ROWS, _ROWS[1]], 'there were 2 rows, now 3'),
])
def test_the_first_metric_that_differs_is_named(other, word):
  assert sameness.compare_metrics(_ROWS, other) == (False, word)


def test_a_file_is_compared_by_every_byte(tmp_path):
  one, other = tmp_path / 'a', tmp_path / 'b'
  one.write_bytes(b'abc')
  other.write_bytes(b'abc')
  found = sameness.compare_files(one, other)
  # As published for SHA-256 (FIPS 180-2).
  assert found.is_same and found.said.count('ba7816bf8f01cfea') == 2
  other.write_bytes(b'abd')
  found = sameness.compare_files(one, other)
  assert not found.is_same and found.said.count('ba7816bf8f01cfea') == 1


def test_reports_differ_in_results_not_in_seconds():
  one = {'ppl': {'qat': 13.0}, 'seconds': 4, 'device': 'a', 'samples': [
      {'prompt': 'x', 'qat': 'y'}
  ], 'tokens_per_second': 3.0, 'seconds_by_phase': {'train': 3}}
  other = one | {'seconds': 5, 'device': 'b', 'tokens_per_second': 1.0,
                 'seconds_by_phase': {'train': 4}}
  assert sameness.compare_reports(one, other) == (True, '3 numbers and texts')
  other['samples'] = [{'prompt': 'x', 'qat': 'z'}]
  assert sameness.compare_reports(one, other) == (
      False, "samples.0.qat was 'y', now 'z'"
  )
