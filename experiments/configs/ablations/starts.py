"""Question: does the start matter, once scales and norms have been trained?

The same run from codes by the format's own rounding, by a search of every
block, and by GPTQ. About 15 minutes a point on two cores with bfloat16
instructions, so 45 in all; `:tiny` takes a minute.

  gemma-qat sweep --config=experiments/configs/ablations/starts.py \
      --workdir=runs/starts
  gemma-qat report runs/starts
"""

from experiments.configs import gemma3_270m_small

get_config = gemma3_270m_small.get_config


def sweep(add) -> None:
  for start in ('reference', 'search', 'gptq'):
    add(start, {'quant.start': start})
