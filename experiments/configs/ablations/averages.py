"""Question: does a running mean of scales and gains help a short run?

Against the last step's, with a cosine to 0, and with a rate that is less than
half as high. Five minutes a point on two cores.

  gemma-qat sweep --config=experiments/configs/ablations/averages.py \
      --workdir=runs/averages
  gemma-qat report runs/averages

Answer: no. At 7e-4 with a cosine to 0, a mean with decay 0.9 ends at 0.0486
nats, the last step at 0.0482; with seed 1 (averages_1) at 0.0512 and 0.0511. The
seed moves both by 0.003, the mean by a tenth of that; held-out KL alike to four
digits. At 3e-4 it was not run.
"""

from experiments.configs import gemma3_270m_small

get_config = gemma3_270m_small.get_config


def sweep(add) -> None:
  for rate in (3e-4, 7e-4):
    for average in (0.0, 0.9):
      add(f'rate_{rate:g}_average_{average:g}', {
          'optimizer.learning_rate': rate, 'optimizer.average': average,
      })
