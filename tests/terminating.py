"""SIGTERM for the process of the tests, as soon as something is so."""

import contextlib
import os
import signal
import threading
import time
from typing import Callable


@contextlib.contextmanager
def terminated_when(is_time: Callable[[], bool]):
  """Sends SIGTERM once is_time() holds, if that is before the end."""
  gone = threading.Event()

  def terminate():
    while not gone.is_set():
      if is_time():
        os.kill(os.getpid(), signal.SIGTERM)
        return
      time.sleep(0.01)

  # A signal that came too late must not end the tests.
  handler = signal.signal(signal.SIGTERM, lambda *_: None)
  killer = threading.Thread(target=terminate)
  killer.start()
  try:
    yield
  finally:
    gone.set()
    killer.join()
    signal.signal(signal.SIGTERM, handler)
