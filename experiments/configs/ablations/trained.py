"""Question: scales or gains, which of them do the work?

Block scales alone, norm gains alone, both; and what factors of low rank or the
weights themselves add on so small a budget, from codes by the format's own
rounding. Five to eight minutes a point on two cores.

  gemma-qat sweep --config=experiments/configs/ablations/trained.py \
      --workdir=runs/trained
  gemma-qat report runs/trained

Answer: scales alone do what scales and gains do (0.0544 and 0.0549 nats, less
than the standard error apart). Gains alone, factors and weights were not run
from this start; from a worse one the weights lost (lab log, 2026-11-22).
"""

from experiments.configs import gemma3_270m_small

get_config = gemma3_270m_small.from_reference


def sweep(add) -> None:
  frozen = (r'^embedding', None)
  scales, norms = (r'/scale$', 'scales'), (r'norm$', 'norms')
  add('both')
  add('scales', {'train.rules': (frozen, scales)})
  add('norms', {'train.rules': (frozen, norms)})
  embedding = (r'^embedding$', 'codes')
  add('low_rank', {
      'quant.modes': (embedding, (r'.', 'lora16')),
      'train.rules': (frozen, scales, norms, (r'/lora_[ab]$', 'factors')),
  })
  add('weights', {
      'quant.modes': (embedding, (r'.', 'learned')),
      'train.rules': (frozen, scales, norms, (r'/master$', 'weights')),
  })
