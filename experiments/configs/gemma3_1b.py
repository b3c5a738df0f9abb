"""Question: how much of the Q4_0 loss comes back in 5,000 steps at 1B?

One key/value head: nothing to part over `tensor`; the width parts into 2 or 4.
Not run yet: no machine was at hand. What each slice would take is planned in
experiments/results/plans.md; the variant behind the colon names the slice.

  gemma-qat plan --config=experiments/configs/gemma3_1b.py:v5e-2x4 \
      --topology=v5e:2x4
  gemma-qat run --config=experiments/configs/gemma3_1b.py:v5e-2x4 \
      --config.model.checkpoint=path/to/gemma-3-1b-pt \
      --workdir=runs/1b
"""

import ml_collections

from experiments.configs import base

# (data, fsdp, tensor, rows a device); 36 blocks of 32 across the width.
DEVICES = {
    'v5e-2x4': (2, 4, 1, 4),
    'v6e-2x2': (1, 4, 1, 8),
    'v5p-2x2x1': (1, 4, 1, 8),
    'h100-8': (8, 1, 1, 8),
}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = base.get_config().unlock()
  c.name = 'gemma3_1b'
  c.model.checkpoint = 'random:1b'
  c.quant.calibration_tokens = 65_536
  c.mesh.fsdp = 4
  return base.finish(c, variant, DEVICES)
