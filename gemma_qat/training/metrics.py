"""Where do a run's numbers go while it runs?

Every number goes to `metrics.jsonl` and to TensorBoard; a terminal gets a
progress bar, a log gets plain lines.
"""

import contextlib
import json
import os
import pathlib
import sys
import time
from typing import Mapping

import rich.console
import rich.progress
import tensorboardX

from gemma_qat import errors
from gemma_qat.checkpoints import atomic
from gemma_qat.checkpoints import regular_files

FILE, EVENTS = 'metrics.jsonl', 'events'


class Writer:
  """Appends rows of scalars to a workdir.

  Opened at step n, it first drops rows of later steps: a run that was stopped
  between two checkpoints repeats those steps and must not count them twice. The
  events of TensorBoard are written anew from the rows that are left: however
  often a run is stopped, they are one file and say the same.
  """

  def __init__(self, workdir: pathlib.Path, step: int | None):
    """Opens a workdir.

    Args:
      workdir: of the run.
      step: whose row is the last to keep; None for none at all.

    Raises:
      UserError: the files cannot be written.
    """
    path = workdir / FILE
    rows = [] if step is None else [
        r for r in read(workdir) if r['step'] <= step
    ]
    with atomic.whole_file(path) as temporary:
      text = ''.join(json.dumps(r) + '\n' for r in rows)
      temporary.write_text(text, encoding='utf-8')
    self._path = path
    with self._disk_errors():
      for old in (workdir / EVENTS).glob('events.out.tfevents.*'):
        old.unlink()
      self._file = open(path, 'a', encoding='utf-8')
      self._events = tensorboardX.SummaryWriter(str(workdir / EVENTS))
    for row in rows:
      self._show(row['step'], {k: v for k, v in row.items() if k != 'step'})

  def write(self, step: int, scalars: Mapping[str, float]):
    """Adds one row; every row is flushed to the file.

    Raises:
      UserError: the disk is full.
    """
    row = {'step': step, **{k: float(v) for k, v in scalars.items()}}
    with self._disk_errors():
      self._file.write(json.dumps(row) + '\n')
      self._file.flush()
    self._show(step, scalars)

  def sync(self):
    """Has the rows on the disk: a checkpoint that follows counts on them.

    Raises:
      UserError: the disk is full.
    """
    with self._disk_errors():
      os.fsync(self._file.fileno())

  def close(self):
    # A full disk was said by the row that met it first.
    with contextlib.suppress(OSError):
      self._file.close()
    self._events.close()

  def _show(self, step, scalars):
    for name, value in scalars.items():
      self._events.add_scalar(name, float(value), step)

  @contextlib.contextmanager
  def _disk_errors(self):
    try:
      yield
    except OSError as error:
      raise errors.UserError(
          f'{self._path} cannot be written ({error.strerror}): make room. The '
          'checkpoints are whole, the same command goes on.'
      ) from error


class Silence:
  """Stands in for a Writer in every process but the first."""

  def __init__(self, workdir: pathlib.Path, step: int | None):
    del workdir, step

  def write(self, step: int, scalars: Mapping[str, float]):
    """Drops the row: the first process writes the same."""

  def sync(self):
    """Has nothing to write."""

  def close(self):
    """Has nothing to close."""


def read(workdir: pathlib.Path) -> list[dict[str, float]]:
  """Reads the rows of a workdir, up to a line that is torn or damaged.

  Raises:
    UserError: the file cannot be read.
  """
  path = pathlib.Path(workdir) / FILE
  if not path.exists():
    return []
  rows = []
  with regular_files.opened(path) as lines:
    for line in lines:
      try:
        row = json.loads(line.decode('utf-8'))
      except (ValueError, RecursionError):
        break
      if not isinstance(row, dict) or not isinstance(row.get('step'), int):
        break
      rows.append(row)
  return rows


class Progress:
  """Shows how far a long piece of work is.

  On a terminal a bar with a live text, elsewhere a plain line now and then;
  nothing when it is another process that shows it.
  """

  def __init__(
      self,
      title: str,
      total: int,
      done: int = 0,
      every: float = 15,
      is_shown: bool = True,
  ):
    self._title, self._total, self._done = title, total, done
    self._every, self._shown = every, 0.0
    self._start, self._first = time.monotonic(), done
    self._bar = None
    self._is_shown = is_shown
    if is_shown and sys.stderr.isatty():
      self._bar = rich.progress.Progress(
          rich.progress.TextColumn('{task.description}'),
          rich.progress.BarColumn(),
          rich.progress.MofNCompleteColumn(),
          rich.progress.TextColumn('{task.fields[text]}'),
          rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
          console=rich.console.Console(stderr=True),
      )
      self._task = self._bar.add_task(
          title, total=total, completed=done, text=''
      )
      self._bar.start()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    if self._bar:
      self._bar.stop()

  def advance(self, amount: int = 1, text: str = ''):
    """Moves on; `text` says what is worth knowing now."""
    self._done += amount
    if self._bar:
      self._bar.update(self._task, completed=self._done, text=text)
      return
    if not self._is_shown:
      return
    now = time.monotonic()
    if now - self._shown < self._every and self._done < self._total:
      return
    self._shown = now
    gone = self._done - self._first
    # Nothing done yet says nothing of the rest.
    left = ''
    if gone:
      seconds = (self._total - self._done) * (now - self._start) / gone
      left = f'{seconds:.0f} s left'
    said = (f'{self._title} {self._done}/{self._total}', text, left)
    print(' '.join(filter(None, said)), file=sys.stderr, flush=True)
