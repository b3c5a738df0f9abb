"""`gemma-qat report`: which runs it finds, and what it refuses."""

import json

import pytest

from gemma_qat import __main__ as cli
from tests.reporting import sample
from tests.reporting import sample_points


def _write(folder, report=None, **changes):
  """A workdir as `gemma-qat run` leaves it, as far as a report reads it."""
  folder.mkdir(parents=True)
  config = {
      'name': 'sample', 'seed': 0, 'quant': {'start': 'gptq'},
      'train': {'batch_size': 2, 'length': 256}, **changes,
  }
  (folder / 'config.json').write_text(json.dumps(config))
  lines = [json.dumps(row) + '\n' for row in sample.rows()]
  (folder / 'metrics.jsonl').write_text(''.join(lines))
  if report is not None:
    (folder / 'report.json').write_text(json.dumps(report))


def _read(folder):
  return (folder / 'report.md').read_text(encoding='utf-8')


def _fails(capsys, arguments, *words):
  assert cli.main(['report', *map(str, arguments)]) == 2
  said = capsys.readouterr().err.strip().split('\n')
  assert len(said) == 1
  for word in words:
    assert word in said[0]


def test_runs_and_sweeps_are_taken_together(tmp_path):
  _write(tmp_path / 'sweep' / 'a', sample_points.report(0.1))
  _write(tmp_path / 'sweep' / 'b', sample_points.report(0.2), seed=1)
  _write(
      tmp_path / 'alone', sample_points.report(0.3), quant={'start': 'search'}
  )
  # No run: what a sweep and a report leave beside the points.
  (tmp_path / 'sweep' / '.submitted').mkdir()
  assert cli.main([
      'report', str(tmp_path / 'alone'), str(tmp_path / 'sweep'),
      f'--to={tmp_path / "to"}',
  ]) == 0
  text = _read(tmp_path / 'to')
  assert '| alone | `quant.start=search` | 1 |' in text
  assert '0.1500 ± 0.0707' in text
  assert {p.name for p in (tmp_path / 'to').iterdir()} == {
      'report.md', 'report.html', 'heldout.png', 'size.png'
  }


def test_points_of_one_name_are_told_apart_by_their_sweep(tmp_path):
  for sweep, start in (('x', 'gptq'), ('y', 'search')):
    _write(
        tmp_path / sweep / 'a', sample_points.report(), quant={'start': start}
    )
  assert cli.main([
      'report', str(tmp_path / 'x'), str(tmp_path / 'y'), f'--to={tmp_path}/to'
  ]) == 0
  assert '| x/a |' in _read(tmp_path / 'to')
  assert '| y/a |' in _read(tmp_path / 'to')


def test_a_run_named_twice_counts_once(tmp_path):
  _write(tmp_path / 's' / 'a', sample_points.report())
  assert cli.main([
      'report', str(tmp_path / 's'), str(tmp_path / 's' / 'a'),
      f'--to={tmp_path}/to',
  ]) == 0
  assert 'one run' in _read(tmp_path / 'to')


def test_a_finished_run_of_the_main_job_can_be_reported(finished, tmp_path):
  workdir, report, _ = finished
  assert cli.main(['report', str(workdir), f'--to={tmp_path}']) == 0
  assert f'{report["kld"]["qat"]:.4f}' in _read(tmp_path)


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
  (tmp_path / 'empty').mkdir()
  _fails(capsys, [tmp_path], str(tmp_path), 'no run')
  _fails(capsys, [tmp_path / 'none'], 'none', 'no folder')


@pytest.mark.parametrize('content, word', [
    ('{"kld": ', 'cannot be read'), ('[1]', 'no JSON object'),
    ('{"steps": 3}', 'tokens'), ('\xff', 'cannot be read'),
    ('[' * 100_000, 'cannot be read'),
])
def test_a_damaged_report_is_named(tmp_path, capsys, content, word):
  _write(tmp_path / 'a')
  (tmp_path / 'a' / 'report.json').write_bytes(content.encode('latin-1'))
  _fails(capsys, [tmp_path], str(tmp_path / 'a'), 'report.json', word)
  assert not (tmp_path / 'report.md').exists()


def test_the_report_of_a_run_is_not_written_over(tmp_path, capsys):
  _write(tmp_path / 'a', sample_points.report())
  _fails(capsys, [tmp_path / 'a'], '--to=DIR')
  _fails(capsys, [tmp_path / 'a', tmp_path], '--to=DIR')
