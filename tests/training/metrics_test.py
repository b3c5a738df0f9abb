"""A run's numbers are in its workdir, once each."""

import pytest

from gemma_qat.training import metrics


def _write(workdir, first, steps):
  writer = metrics.Writer(workdir, first)
  for n in steps:
    writer.write(n, {'kl_nats': 1 / (n + 1)})
  writer.close()


def _steps(workdir):
  return [row['step'] for row in metrics.read(workdir)]


def test_rows_come_back_as_they_were_written(tmp_path):
  _write(tmp_path, 0, [0, 1])
  assert metrics.read(tmp_path) == [
      {'step': 0, 'kl_nats': 1.0}, {'step': 1, 'kl_nats': 0.5}
  ]


def test_a_workdir_without_metrics_has_no_rows(tmp_path):
  assert metrics.read(tmp_path) == []


def test_a_run_that_goes_on_repeats_no_step(tmp_path):
  _write(tmp_path, 0, [0, 2, 4, 6])
  _write(tmp_path, 4, [6, 8])
  assert _steps(tmp_path) == [0, 2, 4, 6, 8]


def test_rows_are_readable_before_the_run_ends(tmp_path):
  writer = metrics.Writer(tmp_path, 0)
  writer.write(3, {'kl_nats': 0.25})
  assert _steps(tmp_path) == [3]
  writer.close()


def test_a_torn_last_line_is_left_out_and_replaced(tmp_path):
  _write(tmp_path, 0, [0, 2, 4])
  with open(tmp_path / metrics.FILE, 'a', encoding='utf-8') as f:
    f.write('{"step": 6, "kl_n')
  assert _steps(tmp_path) == [0, 2, 4]
  _write(tmp_path, 4, [6])
  assert _steps(tmp_path) == [0, 2, 4, 6]


@pytest.mark.parametrize('damaged', [
    b'[' * 100_000, b'9' * 5_000, b'\xe5', b'{"step": ', b'[1]', b'{}',
    b'{"step": "1"}',
], ids=['deep', 'long', 'no UTF-8', 'torn', 'list', 'empty', 'text'])
def test_rows_end_where_a_line_is_damaged(tmp_path, damaged):
  _write(tmp_path, 0, [0, 1])
  with open(tmp_path / metrics.FILE, 'ab') as file:
    file.write(damaged + b'\n{"step": 2}\n')
  assert _steps(tmp_path) == [0, 1]


def test_tensorboard_gets_the_numbers_too(tmp_path):
  _write(tmp_path, 0, [0])
  (events,) = (tmp_path / 'events').iterdir()
  assert b'kl_nats' in events.read_bytes()


def test_without_a_terminal_progress_is_plain_lines(capsys):
  with metrics.Progress('train', total=3) as progress:
    for _ in range(3):
      progress.advance(text='kl 0.1 nats')
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith('train 1/3 kl 0.1 nats')
  assert lines[-1].startswith('train 3/3')


def test_no_time_is_foretold_before_anything_is_done(capsys):
  with metrics.Progress('sweep', total=3, every=0) as progress:
    progress.advance(0, text='a 1/8')
    progress.advance()
  first, second = capsys.readouterr().err.splitlines()
  assert first == 'sweep 0/3 a 1/8'
  assert second.endswith(' s left')


def test_however_often_it_is_stopped_there_is_one_file_of_events(tmp_path):
  _write(tmp_path, None, range(4))
  size = lambda: [
      p.stat().st_size for p in (tmp_path / metrics.EVENTS).iterdir()
  ]
  once = size()
  for _ in range(3):
    _write(tmp_path, 1, range(2, 4))
  assert size() == once and len(once) == 1
