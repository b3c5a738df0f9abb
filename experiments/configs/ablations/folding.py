"""Question: do channels scaled by their activations round better (AWQ)?

With codes by the reference rule, where it was invented, and with GPTQ, which
uses the same statistics. Two minutes a point on two cores more than the run.

  gemma-qat sweep --config=experiments/configs/ablations/folding.py \
      --workdir=runs/folding
  gemma-qat report runs/folding
"""

import ml_collections

from experiments.configs import gemma3_270m_small


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = gemma3_270m_small.get_config(variant).unlock()
  c.name = 'folding'
  return c.lock()


def sweep(add) -> None:
  for start in ('reference', 'gptq'):
    for fold in (False, True):
      add(f'{start}{"_folded" if fold else ""}', {
          'quant.start': start, 'quant.fold': fold,
      })
