"""Question: how much of the Q4_0 loss comes back in 20 minutes on two cores?

The default of `make qat`: the real Gemma 3 270M, codes by GPTQ in the order of
the layers, then block scales and norm gains trained by KL, the codes frozen. The
lab log (experiments/README.md) says why.

  gemma-qat run --config=experiments/configs/gemma3_270m_cpu.py \
      --workdir=runs/270m
"""

import ml_collections

from experiments.configs import base


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = base.get_config().unlock()
  c.name = 'gemma3_270m_cpu'
  c.quant.modes = ((r'.', 'codes'),)
  c.quant.calibration_tokens = 32_768
  c.train.steps = 24
  c.train.batch_size = 4
  c.train.length = 512
  c.train.rules = (
      (r'^embedding', None), (r'/scale$', 'scales'), (r'norm$', 'norms'),
  )
  c.train.checkpoint_every = 12
  c.train.evaluate_every = 12
  c.train.log_every = 1
  c.train.heldout_batches = 2
  c.optimizer.learning_rate = 5e-4
  c.optimizer.warmup_steps = 3
  c.compute.remat = 'none'
  c.evaluation.chunks = 24
  c.evaluation.jax_chunks = 8
  return base.finish(c, variant)
