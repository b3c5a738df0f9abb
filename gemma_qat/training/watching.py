"""Does a run go as it should, step by step?

Numbers are looked at one step late, when the next is under way: no device
waits for it.
"""

import collections
import contextlib
import statistics
import threading
from typing import Any, Iterator, Mapping, Sequence

import numpy as np

from gemma_qat import errors
from gemma_qat import hosts

# What of a step's metrics is for this module, not for the metrics' file.
NAMES = ('skipped_in_row', 'skipped_steps', 'culprit')
# A spike is so many times the median of so many steps before.
_SPIKE, _RECENT, _FEWEST = 3.0, 32, 8


class Watch:
  """Notices steps that were skipped, and losses out of line.

  Attributes:
    skipped: steps skipped so far, counted from the run's first.
    spikes: steps whose KL was more than three times the median of the 32
      before.
  """

  def __init__(
      self,
      leaves: Sequence[str],
      most_in_row: int,
      seen: Mapping[str, Any] | None = None,
  ):
    """Begins to watch.

    Args:
      leaves: sorted paths of what is trained, as `step.make_step` counts them.
      most_in_row: skipped steps in a row that end the run.
      seen: `state` of the session before.
    """
    seen = seen or {}
    self.skipped = seen.get('skipped', 0)
    self.spikes = seen.get('spikes', 0)
    self._recent = collections.deque(seen.get('recent', ()), maxlen=_RECENT)
    self._leaves, self._most = leaves, most_in_row
    self._pending = None

  def after(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Takes the metrics of a step, which may still be computed.

    Raises:
      UserError: too many steps in a row were skipped.
    """
    # First: nothing is asked of the new step before the old one is done.
    self.settle()
    self._pending = step, scalars

  def settle(self) -> None:
    """Looks at the newest step, too, and waits for it.

    Raises:
      UserError: too many steps in a row were skipped.
    """
    if self._pending is None:
      return
    (step, scalars), self._pending = self._pending, None
    kl = float(scalars['kl_nats'])
    in_row = int(scalars['skipped_in_row'])
    if in_row:
      self._tell_skipped(step, scalars, in_row)
      return
    if len(self._recent) >= _FEWEST:
      usual = statistics.median(self._recent)
      if kl > _SPIKE * usual:
        self.spikes += 1
        hosts.say(
            f'Step {step}: the KL is {kl:.4f} nats, {kl / usual:.1f} times the '
            f'median of the {len(self._recent)} steps before.'
        )
    self._recent.append(kl)

  def row(self) -> dict[str, float]:
    """Scalars for the metrics; nothing where there is nothing to tell."""
    counts = {'skipped_steps': self.skipped, 'loss_spikes': self.spikes}
    return {name: count for name, count in counts.items() if count}

  def state(self) -> dict[str, Any]:
    """What a checkpoint keeps, so that a stopped run sees the same."""
    return {
        'skipped': self.skipped, 'spikes': self.spikes,
        'recent': list(self._recent),
    }

  def _tell_skipped(self, step, scalars, in_row):
    self.skipped = int(scalars['skipped_steps'])
    culprit = int(scalars['culprit'])
    what = (
        f'the loss is {float(scalars["loss"])}' if culprit < 0 else
        f'the gradient of {self._leaves[culprit]} is not finite '
        f'(loss {float(scalars["loss"]):.4g})'
    )
    # Steps and batches are counted alike, whatever was skipped.
    said = f'Step {step} on batch {step} was skipped: {what}'
    if in_row >= self._most:
      raise errors.UserError(
          f'{said}. That makes {in_row} in a row (config.train.most_skipped='
          f'{self._most}): lower config.optimizer.learning_rate or lengthen '
          'warmup_steps and start with a new --workdir. Checkpoints of '
          'earlier steps are whole.'
      )
    hosts.say(f'{said}; {self.skipped} skipped so far.')


def finite(row: Mapping[str, float]) -> dict[str, float]:
  """Leaves out what is not finite: of a skipped step, and no JSON either."""
  return {name: x for name, x in row.items() if np.isfinite(x)}


@contextlib.contextmanager
def patience(what: str, seconds: float) -> Iterator[None]:
  """Says so if the block takes longer than `seconds`, and again later."""
  done = threading.Event()

  def tell():
    times = 1
    while not done.wait(seconds):
      hosts.say(f'Waiting for {what} for {times * seconds:g} s.')
      times += 1

  threading.Thread(target=tell, daemon=True).start()
  try:
    yield
  finally:
    done.set()
