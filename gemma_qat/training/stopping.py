"""How does a long piece of work learn that it should stop?"""

import contextlib
import signal
from typing import Callable, Iterator

from gemma_qat import errors
from gemma_qat import hosts


class Counter:
  """Counts SIGTERM and Ctrl-C instead of ending by them.

  Attributes:
    asked: how often it was asked to stop.
  """

  def __init__(self, on_ask: Callable[[int], None]):
    """Calls on_ask(how often by now) each time."""
    self.asked = 0
    self._on_ask = on_ask

  def __enter__(self):
    self._old = {}
    try:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._ask)
    except ValueError:
      pass  # Not the main thread: whoever runs us handles signals.
    return self

  def __exit__(self, *exception):
    for number in self._old:
      self.leave(number)

  def leave(self, number: int) -> None:
    """Lets one kind of signal do again what it did before."""
    signal.signal(number, self._old[number])

  def _ask(self, number, frame):
    del frame
    self.asked += 1
    self._on_ask(self.asked)


class Signal(Counter):
  """Turns SIGTERM and the first Ctrl-C into a request to stop.

  The second of a kind ends the process.
  """

  def __init__(self, after: str = 'this step'):
    super().__init__(lambda times: hosts.say(f'Stopping after {after} ...'))

  def _ask(self, number, frame):
    super()._ask(number, frame)
    self.leave(number)


@contextlib.contextmanager
def at_once(then: str) -> Iterator[None]:
  """Turns SIGTERM into `Stopped` for work that is done anew, not gone on with.

  Files under way are removed on the way out; Ctrl-C does that by itself.
  """
  def stop(number, frame):
    raise errors.Stopped(f'Stopped; {then}.')

  try:
    old = signal.signal(signal.SIGTERM, stop)
  except ValueError:
    old = None  # Not the main thread: whoever runs us handles signals.
  try:
    yield
  finally:
    if old is not None:
      signal.signal(signal.SIGTERM, old)
