"""Question: does a running mean of scales and gains help a short run?

Against the last step's, with a cosine to 0, and with a rate that is less than
half as high. Five minutes a point on two cores.

  gemma-qat sweep --config=experiments/configs/ablations/averages.py \
      --workdir=runs/averages
  gemma-qat report runs/averages
"""

from experiments.configs import gemma3_270m_small

get_config = gemma3_270m_small.get_config


def sweep(add) -> None:
  for rate in (3e-4, 7e-4):
    for average in (0.0, 0.9):
      add(f'rate_{rate:g}_average_{average:g}', {
          'optimizer.learning_rate': rate, 'optimizer.average': average,
      })
