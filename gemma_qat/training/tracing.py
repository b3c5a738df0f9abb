"""Where does a step's time go, by the profiler's account?"""

import pathlib
from typing import Any

import jax

from gemma_qat import hosts

FOLDER = 'profile'
# Steps of a session before the first that is traced: they compile.
_SKIPPED = 2


class Trace:
  """Traces some consecutive steps of a session into WORKDIR/profile.

  Read it with TensorBoard's profile plugin, or the .trace.json.gz in it with
  Perfetto. Every process writes its own. Use as a context manager.
  """

  def __init__(self, workdir: pathlib.Path, steps: int, first: int):
    self._folder = workdir / FOLDER
    self._start = first + _SKIPPED + 1
    self._stop = self._start + steps - 1
    self._is_running = False

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._end()

  def before(self, step: int) -> None:
    """Begins, if this is the first step to trace."""
    if step == self._start <= self._stop:
      jax.profiler.start_trace(str(self._folder))
      self._is_running = True

  def after(self, step: int, outputs: Any) -> None:
    """Ends behind the last step, once its outputs are computed."""
    if step == self._stop and self._is_running:
      jax.block_until_ready(outputs)
      self._end()

  def _end(self):
    if self._is_running:
      self._is_running = False
      jax.profiler.stop_trace()
      hosts.say(f'Traced steps {self._start} to {self._stop}: {self._folder}')
