"""Question: do channels scaled by their activations round better (AWQ)?

With codes by the reference rule, where it was invented, and with GPTQ, which
uses the same statistics. Two minutes a point on two cores more than the run.

  gemma-qat sweep --config=experiments/configs/ablations/folding.py \
      --workdir=runs/folding
  gemma-qat report runs/folding

Answer: after the reference rule it is worth a factor of two (0.208 -> 0.103
nats, 0.405 -> 0.134 before the first step). After GPTQ it is worth nothing
(0.0482 -> 0.0507; held-out 0.0396 -> 0.0426; without it another seed ends at
0.0511), so it stays off.
"""

from experiments.configs import gemma3_270m_small

get_config = gemma3_270m_small.get_config


def sweep(add) -> None:
  rate = {'optimizer.learning_rate': gemma3_270m_small.REFERENCE_RATE}
  for start, more in {'reference': rate, 'gptq': {}}.items():
    for fold in (False, True):
      add(f'{start}{"_folded" if fold else ""}', {
          'quant.start': start, 'quant.fold': fold, **more,
      })
