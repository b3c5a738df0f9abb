"""Question: do channels scaled by their activations round better (AWQ)?

With codes by the reference rule, where it was invented, and with GPTQ, which
uses the same statistics. Two minutes a point on two cores more than the run.

  gemma-qat sweep --config=experiments/configs/ablations/folding.py \
      --workdir=runs/folding
  gemma-qat report runs/folding
"""

from experiments.configs import gemma3_270m_small

get_config = gemma3_270m_small.get_config


def sweep(add) -> None:
  for start, rate in {'reference': 2e-3, 'gptq': 7e-4}.items():
    for fold in (False, True):
      add(f'{start}{"_folded" if fold else ""}', {
          'quant.start': start, 'quant.fold': fold,
          'optimizer.learning_rate': rate,
      })
