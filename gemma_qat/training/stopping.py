"""How does a long piece of work learn that it should stop?"""

import signal

from gemma_qat import hosts


class Signal:
  """Turns SIGTERM and the first Ctrl-C into a request to stop."""

  asked = False

  def __init__(self, after: str = 'this step'):
    self._after = after

  def __enter__(self):
    self._old = {}
    try:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._ask)
    except ValueError:
      pass  # Not the main thread: whoever runs us handles signals.
    return self

  def __exit__(self, *exception):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _ask(self, number, frame):
    del frame
    self.asked = True
    hosts.say(f'Stopping after {self._after} ...')
    signal.signal(number, self._old[number])
