"""Are runs told apart by what differs, and seeds put together?"""

import pytest

from gemma_qat import errors
from gemma_qat.reporting import points
from tests.reporting import sample_points


def test_runs_that_differ_in_the_seed_alone_are_one_group():
  groups = points.group(sample_points.sweep())
  assert [(g.name, len(g.points)) for g in groups] == [
      ('gptq', 3), ('reference', 1), ('search', 1)
  ]


def test_mean_and_deviation_are_those_worked_out_by_hand():
  gptq, reference, _ = points.group(sample_points.sweep())
  # 0.12, 0.15, 0.18.
  assert points.mean(gptq, 'kld.qat') == pytest.approx((0.15, 0.03))
  # 0.2 times 1, 1.25 and 0.75.
  assert points.mean(gptq, 'heldout.last') == pytest.approx((0.2, 0.05))
  assert points.mean(reference, 'kld.qat') == (0.3, None)


def test_a_figure_that_one_seed_lacks_has_no_mean():
  made = sample_points.report() | {'recovered_ppl': None}
  one = points.make_point('b', sample_points.CONFIG | {'seed': 1}, [], made, '')
  (group,) = points.group([sample_points.point('a'), one])
  assert points.mean(group, 'recovered_ppl') == (None, None)
  assert points.mean(group, 'heldout.last') == (None, None)


def test_an_unfinished_seed_is_not_averaged_with_finished_ones():
  groups = points.group([
      sample_points.point('a', seed=0),
      sample_points.point('b', seed=1, is_finished=False),
  ])
  assert [len(g.points) for g in groups] == [1, 1]


def test_a_change_is_what_the_most_do_not_have():
  groups = points.group([
      sample_points.point('common'),
      sample_points.point('fast', optimizer__learning_rate=2e-3),
      sample_points.point('search', quant__start='search'),
  ])
  assert [g.changes for g in groups] == [
      {}, {'optimizer.learning_rate': 2e-3}, {'quant.start': 'search'}
  ]


def test_seeds_do_not_decide_what_is_common():
  groups = points.group(sample_points.sweep()[:4])
  assert [g.changes for g in groups] == [
      {'quant.start': 'gptq'}, {'quant.start': 'reference'}
  ]


def test_changes_are_written_with_rules_and_a_dash_for_none():
  changes = {'quant.start': 'gptq', 'quant.rules': (('a|b', None),)}
  said = points.say_changes(changes)
  assert said == 'quant.start=gptq, quant.rules=[["a|b", null]]'
  assert points.say_changes({}) == '-'


@pytest.mark.parametrize('names, shared', [
    (('lr-0', 'lr-1'), 'lr'), (('lr-seed0', 'lr-seed1'), 'lr'),
    (('seed0', 'seed1'), 'seed'), (('a', 'b'), 'a'),
])
def test_a_group_is_called_what_its_runs_share(names, shared):
  (group,) = points.group([
      sample_points.point(n, seed=i) for i, n in enumerate(names)
  ])
  assert group.name == shared


def test_equal_names_of_groups_fall_back_to_the_first_run():
  groups = points.group([
      sample_points.point('x-0', seed=0, quant__start='search'),
      sample_points.point('x-1', seed=1, quant__start='search'),
      sample_points.point('x-2', seed=0), sample_points.point('x-3', seed=1),
  ])
  assert [g.name for g in groups] == ['x-0', 'x-2']


@pytest.mark.parametrize('path, value', [
    ('kld', None), ('kld', {'ptq': 0.6}), ('ppl', [1, 2, 3]),
    ('steps', 'many'), ('seconds', float('nan')), ('device', 7),
    ('seconds', 10**400),
    ('recovered_kld', 'most'),
])
def test_a_report_without_what_is_compared_is_refused(path, value):
  made = sample_points.report() | {path: value}
  with pytest.raises(errors.UserError, match=f'report.json.*{path}'):
    points.make_point('a', {}, [], made, 'finished')


def test_rows_that_are_none_are_left_out():
  rows = [7, {'step': 'a'}, {'step': 2, 'heldout_kl_nats': 0.5}]
  point = points.make_point('a', {}, rows, None, '')
  assert point.heldout == ((2, 0.5),)
