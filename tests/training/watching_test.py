"""What goes wrong in a run is said, counted, and in the end refused."""

import time

import pytest

from gemma_qat import errors
from gemma_qat.training import watching

LEAVES = ('a/scale', 'b/scale')


def _scalars(kl=1.0, in_row=0, in_all=0, culprit=-1):
  return {'loss': kl, 'kl_nats': kl, 'skipped_in_row': in_row,
          'skipped_steps': in_all, 'culprit': culprit}


def test_a_step_is_looked_at_when_the_next_is_under_way(capsys):
  watch = watching.Watch(LEAVES, 3)
  watch.after(7, _scalars(float('nan'), 1, 1, culprit=1))
  assert not watch.skipped
  watch.after(8, _scalars())
  assert watch.row() == {'skipped_steps': 1}
  said = capsys.readouterr().err
  assert 'Step 7 on batch 7 was skipped' in said
  assert 'the gradient of b/scale is not finite' in said


def test_too_many_in_a_row_end_the_run():
  watch = watching.Watch(LEAVES, 2)
  watch.after(7, _scalars(float('inf'), 1, 5))
  watch.after(8, _scalars(float('inf'), 2, 6))
  with pytest.raises(errors.UserError, match=(
      'Step 8 on batch 8 was skipped: the loss is inf. That makes 2 in a row'
  )):
    watch.settle()


def test_a_loss_out_of_line_is_a_spike_and_no_reason_to_stop(capsys):
  watch = watching.Watch(LEAVES, 2)
  for step in range(1, 20):
    watch.after(step, _scalars(9.0 if step in (3, 15) else 1.0 + step / 50))
  watch.settle()
  # The first steps are compared with nothing.
  assert watch.spikes == 1 and watch.row() == {'loss_spikes': 1}
  assert 'Step 15: the KL is 9.0000 nats, 7.7 times' in capsys.readouterr().err


def test_a_run_that_goes_on_remembers_what_it_saw():
  whole, first = watching.Watch(LEAVES, 2), watching.Watch(LEAVES, 2)
  kls = [1.0] * 10 + [5.0] + [1.0] * 5 + [7.0, 1.0]
  for step, kl in enumerate(kls):
    whole.after(step, _scalars(kl))
  for step, kl in enumerate(kls[:9]):
    first.after(step, _scalars(kl))
  first.settle()
  second = watching.Watch(LEAVES, 2, first.state())
  for step, kl in enumerate(kls[9:], 9):
    second.after(step, _scalars(kl))
  whole.settle()
  second.settle()
  assert second.state() == whole.state() and second.spikes == 2


def test_rows_hold_finite_numbers_alone():
  assert watching.finite({'a': 1.0, 'b': float('nan'), 'c': -float('inf')}) == {
      'a': 1.0
  }


def test_who_waits_long_is_told_what_for(capsys):
  with watching.patience('the text of step 3', 0.05):
    time.sleep(0.18)
  with watching.patience('nothing', 5):
    pass
  said = capsys.readouterr().err.splitlines()
  assert said[:2] == [
      'Waiting for the text of step 3 for 0.05 s.',
      'Waiting for the text of step 3 for 0.1 s.',
  ]
  assert not any('nothing' in line for line in said)
