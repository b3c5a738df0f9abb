"""Question: what is the smallest run whose differences still say something?

The default of `make qat` with half of the calibration, 24 steps of 1,024
tokens and half of the evaluation: 10 minutes on two cores with bfloat16
instructions, 5 from codes that are there. The questions of ablations/ are asked
of it, so that the answers can be compared with one another; they are answers
for this budget.

  gemma-qat run --config=experiments/configs/gemma3_270m_small.py \
      --workdir=runs/small
"""

import ml_collections

from experiments.configs import gemma3_270m_cpu

# The best known from codes by the format's own rounding (lab log, 2026-11-22);
# from GPTQ codes it undoes what they coordinate.
REFERENCE_RATE = 2e-3


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = gemma3_270m_cpu.get_config(variant).unlock()
  c.name = 'gemma3_270m_small'
  if variant == 'tiny':
    return c.lock()
  c.quant.calibration_tokens = 16_384
  c.train.steps = 24
  c.train.batch_size = 2
  c.optimizer.learning_rate = 7e-4
  c.train.checkpoint_every = 24
  c.train.evaluate_every = 12
  c.train.heldout_batches = 4
  c.optimizer.warmup_steps = 3
  c.evaluation.chunks = 12
  c.evaluation.jax_chunks = 1
  return c.lock()


def from_reference(variant: str = '') -> ml_collections.ConfigDict:
  """The same from codes by the format's own rounding: more is to be won back.
  """
  c = get_config(variant).unlock()
  c.quant.start = 'reference'
  c.optimizer.learning_rate = REFERENCE_RATE
  return c.lock()
