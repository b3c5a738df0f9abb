"""Question: what comes back at 12B when one GPU of 80 GB has to do?

Codes stand still, block scales and norm gains are trained: what the optimizer
keeps is a thirtieth of what it keeps of weights. Not run yet: no machine was at
hand. The plan says yes: 52.2 of 85.5 GB at four rows of 1,024 tokens, one at a
time (experiments/results/plans.md).

  gemma-qat plan --config=experiments/configs/gemma3_12b_scales.py:h100-1 \
      --topology=gpu:1xH100
  gemma-qat run --config=experiments/configs/gemma3_12b_scales.py:h100-1 \
      --config.model.checkpoint=path/to/gemma-3-12b-pt \
      --workdir=runs/12b-scales
"""

import ml_collections

from experiments.configs import base
from experiments.configs import gemma3_12b

# (data, fsdp, tensor, rows a device)
DEVICES = {'h100-1': (1, 1, 1, 4)}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = gemma3_12b.get_config().unlock()
  c.name = 'gemma3_12b_scales'
  c.quant.modes = ((r'.', 'codes'),)
  c.train.rules = (
      (r'^embedding', None), (r'/scale$', 'scales'), (r'norm$', 'norms'),
  )
  c.train.accumulate = 4
  c.mesh.fsdp = 1
  return base.finish(c, variant, DEVICES)
