"""How much of what the devices can do does a run use?"""

import time

import jax

from gemma_qat import devices
from gemma_qat.model import config as model_config
from gemma_qat.model import flops
from gemma_qat.training import settings

# What of a row of metrics is not the same when a run is repeated.
NAMES = ('tokens_per_second', 'teraflops_per_second', 'mfu')


class Speed:
  """How fast steps go by, between calls of `restart` and `at`."""

  def __init__(
      self,
      train: settings.TrainSettings,
      config: model_config.ModelConfig,
      train_head: bool,
  ):
    self._tokens = train.batch_size * train.length
    self._flops = flops.train_step(
        config, train.batch_size, train.length, train_head
    )
    device = devices.find(jax.devices()[0].device_kind)
    self._peak = device and device.flops and device.flops * jax.device_count()
    self.restart(0)

  def restart(self, step: int) -> None:
    """Leaves out of account what happened so far."""
    self._clock, self._since, self.said = time.monotonic(), step, ''

  def at(self, step: int) -> dict[str, float]:
    """Scalars of the steps since; `said` is the same in words.

    mfu: FLOP/s that the model asks for (see `model.flops`) over the peak of
    the devices; not where that is unknown, as of CPUs.
    """
    rate = (step - self._since) / max(time.monotonic() - self._clock, 1e-9)
    row = {
        'tokens': step * self._tokens,
        'tokens_per_second': rate * self._tokens,
        'teraflops_per_second': rate * self._flops / 1e12,
    }
    self.said = f'{row["tokens_per_second"]:.0f} tokens/s, '
    if self._peak:
      row['mfu'] = rate * self._flops / self._peak
      self.said += f'{row["mfu"]:.1%} MFU'
    else:
      self.said += f'{row["teraflops_per_second"]:.3f} TFLOP/s'
    return row
