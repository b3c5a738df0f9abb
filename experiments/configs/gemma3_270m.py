"""Question: how much of the Q4_0 loss comes back in 5,000 steps on one GPU?

Weights, block scales and norm gains, from GPTQ codes. Not run yet: no
accelerator was at hand. The command, and nothing else, is ready:

  pip install -e '.[cuda]'
  gemma-qat run --config=experiments/configs/gemma3_270m.py \
      --workdir=runs/270m-5000
"""

import ml_collections

from experiments.configs import base

# (data, fsdp, tensor, rows a device): small enough to be whole on each.
DEVICES = {
    'h100-1': (1, 1, 1, 16),
    'v5e-2x2': (4, 1, 1, 4),
    'v6e-2x2': (4, 1, 1, 4),
}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = base.get_config().unlock()
  c.name = 'gemma3_270m'
  c.quant.calibration_tokens = 65_536
  return base.finish(c, variant, DEVICES)
