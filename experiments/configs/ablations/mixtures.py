"""Question: where is a Q8_0 matrix worth its bytes?

All matrices in Q4_0, against the first and the last layer, every down
projection, or every value and output projection in Q8_0. Layers have paths of
their own for it, so more is compiled: 11 minutes a point on two cores.

  gemma-qat sweep --config=experiments/configs/ablations/mixtures.py \
      --workdir=runs/mixtures
  gemma-qat report runs/mixtures

Answer: nowhere in particular, once the rest is rounded well. A megabyte takes
0.0008 nats off in the down projections (0.0482 -> 0.0384), 0.0008 in the first
and last layer (0.0440), 0.0006 in value and output (0.0436), 0.0009 if all is
Q8_0. By the format's own rounding value and output are worth most: 0.021 a
megabyte, 0.009 in the first and last layer, 0.007 in the down projections.
"""

from experiments.configs import gemma3_270m_small

get_config = gemma3_270m_small.get_config


def sweep(add) -> None:
  matrices = r'(attn_[qkvo]|mlp_(gate|up|down))$'
  rest = (matrices, 'q4_0'), (r'^embedding$', 'q8_0')
  add('all_q4_0')
  for name, pattern in {
      'first_and_last_layer': r'tail/layer_(0|17)/' + matrices,
      'down': r'mlp_down$',
      'value_and_output': r'attn_[vo]$',
  }.items():
    add(name, {
        'model.scan_layers': False, 'quant.rules': ((pattern, 'q8_0'), *rest),
    })
