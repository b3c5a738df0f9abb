"""Does the terminal's table say the figures, whole and plain?"""

from gemma_qat.reporting import tables
from tests.reporting import sample


def test_table_holds_every_model_with_its_figures():
  f = sample.fidelities()
  text = tables.render_table([
      ('base.gguf', None, f['base']),
      ('qat.gguf', 241_300_000, f['qat']),
  ])
  lines = text.splitlines()
  assert 'PPL ± stderr' in lines[0] and 'top-1 %' in lines[0]
  assert lines[-2].split() == 'base.gguf - 14.000 ± 0.301 - - -'.split()
  assert lines[-1].split() == (
      'qat.gguf 241.3 15.000 ± 0.353 0.1500 1.7500 81.25'.split()
  )
  assert '\x1b' not in text


def test_long_names_with_brackets_are_neither_cut_nor_read_as_markup():
  name = '/runs/[bold]' + 'x' * 300 + '/:smile:.gguf'
  text = tables.render_table([(name, 1, sample.fidelities()['qat'])])
  assert name in text


def test_error_takes_the_decimals_of_its_perplexity():
  f = sample.fidelity(262_900.4, 3100.26)
  assert '262,900 ± 3,100 ' in tables.render_table([('tiny', 1, f)])
