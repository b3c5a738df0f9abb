"""Does a comparison say what was measured, and no more?"""

from gemma_qat.reporting import comparison
from gemma_qat.reporting import points
from tests.reporting import sample_points


def _make(some):
  return comparison.make(points.group(some))


def _cells(made, name):
  row = next(r for r in made.results.rows if r[0] == name)
  return dict(zip(made.results.columns, row))


def test_a_row_holds_means_and_deviations_over_seeds():
  cells = _cells(_make(sample_points.sweep()), 'gptq')
  assert cells['n'] == '3'
  assert cells['KLD QAT'] == '0.1500 ± 0.0300'
  assert cells['KLD won back'] == '75.0 % ± 5.0'
  assert cells['held-out KL, step 0'] == '0.6000 ± 0.1500'
  assert cells['PPL QAT'] == '15.000'
  assert (cells['steps'], cells['tokens']) == ('120', '61,440')
  assert cells['MB'] == '241.3'
  assert cells['changes'] == 'quant.start=gptq'


def test_a_single_run_has_no_deviation():
  cells = _cells(_make(sample_points.sweep()), 'reference')
  assert not any('±' in cell for cell in cells.values())


def test_unfinished_runs_are_listed_apart():
  made = _make(sample_points.sweep())
  assert 'search' not in {r[0] for r in made.results.rows}
  assert made.unfinished.rows == [
      ('search', 'quant.start=search', 'stopped at step 40', '0.2200')
  ]


def test_no_difference_is_claimed_that_seeds_do_not_carry():
  seeds = lambda name, klds, **changes: [
      sample_points.point(f'{name}-{i}', k, seed=i, **changes)
      for i, k in enumerate(klds)
  ]
  close = _make(
      seeds('a', (0.1, 0.3)) + seeds('b', (0.12, 0.32), quant__start='search')
  )
  assert 'smaller than the spread over seeds' in close.summary
  apart = _make(
      seeds('a', (0.1, 0.11)) + seeds('b', (0.3, 0.31), quant__start='search')
  )
  assert 'smaller' not in apart.summary and 'chance' not in apart.summary
  assert 'chance' in _make(sample_points.sweep()).summary


def test_other_chunks_devices_and_revisions_are_remarked_upon():
  first = sample_points.point('a')
  changed = sample_points.report() | {
      'chunks': 8, 'device': 'a GPU', 'git': 'fedcba9876'
  }
  second = points.make_point(
      'b', first.config | {'quant.start': 'search'}, [], changed, 'finished'
  )
  assert 'not all measured in the same way' in _make([first, second]).summary
  notes = ' '.join(_make([first, second]).notes)
  assert 'Not all runs were measured in the same way' in notes
  assert 'b: measured by' in notes and '8 chunks' in notes
  assert 'devices differ' in notes and 'fedcba987' in notes
  alone = ' '.join(_make([first]).notes)
  assert 'Not all' not in alone and 'differ' not in alone


def test_a_revision_may_be_anything():
  runs = [sample_points.point('a'), sample_points.point('b', quant__start='x')]
  runs[0].report['git'] = ['no', 'text']
  assert any('different revisions' in note for note in _make(runs).notes)


def test_markdown_holds_every_cell_and_the_plots():
  made = _make(sample_points.sweep())
  text = comparison.render_markdown(made, comparison.PLOTS)
  for table in (made.results, made.unfinished):
    for row in table.rows:
      for cell in row:
        assert cell in text, cell
  assert '(heldout.png)' in text and '(size.png)' in text
  assert 'ai.google.dev/gemma/terms' in text


def test_runs_none_of_which_is_finished_are_compared_too():
  made = _make(sample_points.sweep()[-1:])
  assert 'No run is finished' in made.summary
  assert '## Not finished' in comparison.render_markdown(made)
