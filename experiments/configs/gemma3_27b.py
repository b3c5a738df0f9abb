"""Question: how much of the Q4_0 loss comes back in 5,000 steps at 27B?

Weights, block scales and norm gains, from GPTQ codes (one layer at a time).
Not run yet: no machine was at hand. What each slice would take is planned in
experiments/results/plans.md; the variant behind the colon names the slice.

  gemma-qat plan --config=experiments/configs/gemma3_27b.py:v5p-2x2x4 \
      --topology=v5p:2x2x4
  gemma-qat run --config=experiments/configs/gemma3_27b.py:v5p-2x2x4 \
      --config.model.checkpoint=path/to/gemma-3-27b-pt \
      --workdir=runs/27b
"""

import ml_collections

from experiments.configs import base

# (data, fsdp, tensor, rows a device); 168 blocks of 32 across the width,
# 16 key/value heads.
DEVICES = {
    'v5p-2x2x4': (2, 8, 1, 4),
    'v5p-4x4x4': (8, 8, 1, 4),
    'v5e-8x8': (1, 8, 8, 2),
    'v6e-8x8': (2, 8, 4, 4),
    'h100-8': (1, 8, 1, 2),
}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = base.get_config().unlock()
  c.name = 'gemma3_27b'
  c.model.checkpoint = 'random:27b'
  c.quant.calibration_tokens = 65_536
  c.mesh.fsdp = 8
  return base.finish(c, variant, DEVICES)
