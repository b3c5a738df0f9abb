"""Question: scales or gains, which of them do the work?

Block scales alone, norm gains alone, both; and what factors of low rank or the
weights themselves add on so small a budget, from codes by the format's own
rounding. Five to eight minutes a point on two cores.

  gemma-qat sweep --config=experiments/configs/ablations/trained.py \
      --workdir=runs/trained
  gemma-qat report runs/trained

Answer: the scales. From 0.405 nats on held-out text, scales and gains reach
0.180 in 24 steps, gains alone 0.370. From GPTQ scales alone did what both do
(0.0544 and 0.0549 nats; lab log, 2026-11-26). Weights at 2e-5 flip codes and do
harm: 0.397 held-out, 0.562 after half of the steps. They want more steps than
that. Low rank was not run.
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
