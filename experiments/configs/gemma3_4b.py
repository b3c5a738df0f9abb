"""Question: how much of the Q4_0 loss comes back in 5,000 steps at 4B?

Weights, block scales and norm gains, from GPTQ codes (one layer at a time).
Not run yet: no machine was at hand. What each slice would take is planned in
experiments/results/plans.md; the variant behind the colon names the slice.

  gemma-qat plan --config=experiments/configs/gemma3_4b.py:v5e-4x4 \
      --topology=v5e:4x4
  gemma-qat run --config=experiments/configs/gemma3_4b.py:v5e-4x4 \
      --config.model.checkpoint=path/to/gemma-3-4b-pt \
      --workdir=runs/4b
"""

import ml_collections

from experiments.configs import base

# (data, fsdp, tensor, rows a device); 80 blocks of 32 across the width,
# 4 key/value heads.
DEVICES = {
    'v5e-4x4': (1, 16, 1, 4),
    'v6e-2x4': (1, 8, 1, 4),
    'v5p-2x2x1': (1, 4, 1, 8),
    'h100-8': (1, 8, 1, 8),
    'h100-1': (1, 1, 1, 8),
}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = base.get_config().unlock()
  c.name = 'gemma3_4b'
  c.model.checkpoint = 'random:4b'
  c.quant.calibration_tokens = 65_536
  c.mesh.fsdp = 8
  return base.finish(c, variant, DEVICES)
