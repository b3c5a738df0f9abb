"""Question: does the start matter, once scales and norms have been trained?

The same run from codes by the format's own rounding, by a search of every
block, by GPTQ of every layer for the teacher's activations, and by GPTQ layer
after layer, each making up for a share of what those before it lost. Five
minutes a point on two cores.

  gemma-qat sweep --config=experiments/configs/ablations/starts.py \
      --workdir=runs/starts
  gemma-qat report runs/starts
"""

from experiments.configs import gemma3_270m_small

get_config = gemma3_270m_small.get_config


def sweep(add) -> None:
  for start in ('reference', 'search'):
    add(start, {'quant.start': start})
  for share in (0.0, 0.25, 0.5, 0.75):
    add(f'gptq_{share:g}', {'quant.error_propagation': share})
