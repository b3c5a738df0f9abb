"""Question: how much of the Q4_0 loss comes back in 20 minutes on two cores?

The default of `make qat`: the real Gemma 3 270M, codes by GPTQ, then block
scales and norm gains trained by KL with the codes frozen.

  gemma-qat run --config=experiments/configs/gemma3_270m_cpu.py \
      --workdir=runs/270m
"""

import ml_collections

from experiments.configs import base


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = base.get_config().unlock()
  c.name = 'gemma3_270m_cpu'
  c.quant.modes = ((r'.', 'codes'),)
  c.train.rules = (
      (r'^embedding', None), (r'/scale$', 'scales'), (r'norm$', 'norms'),
  )
  return base.finish(c, variant)
