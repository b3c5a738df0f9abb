"""Question: what does an embedding of four bits cost?

The file with everything in Q4_0 is 158 MB instead of 241. GPTQ rounds the
embedding by what the head reads; its scales stand still, or are trained. Eight
minutes a point on two cores.

  gemma-qat sweep --config=experiments/configs/ablations/embedding.py \
      --workdir=runs/embedding
  gemma-qat report runs/embedding

Answer: 0.027 nats and 0.40 of perplexity for 84 MB less. Trained scales were
run from an older start only, 0.0821 against 0.0549 (lab log, 2026-11-26), and
won back little of it.
"""

from experiments.configs import gemma3_270m_small

get_config = gemma3_270m_small.get_config


def sweep(add) -> None:
  everything = ((r'(attn_[qkvo]|mlp_(gate|up|down))$', 'q4_0'),
                (r'^embedding$', 'q4_0'))
  scales_too = ((r'^embedding/codes$', None), (r'/scale$', 'scales'),
                (r'norm$', 'norms'))
  add('q8_0')
  add('q4_0', {'quant.rules': everything})
  add('q4_0_scales_trained', {
      'quant.rules': everything, 'train.rules': scales_too,
  })
