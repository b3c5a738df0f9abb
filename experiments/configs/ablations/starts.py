"""Question: does the start matter, once scales and norms have been trained?

The same run from codes by the format's own rounding, by a search of every
block, by GPTQ of every layer for the teacher's activations, and by GPTQ layer
after layer, each making up for a share of what those before it lost. Ten
minutes a point on two cores.

  gemma-qat sweep --config=experiments/configs/ablations/starts.py \
      --workdir=runs/starts
  gemma-qat report runs/starts

Answer: yes, more than all else. After the same 24 steps codes by the format's
own rounding end at 0.208 nats, GPTQ in the order of the layers with a share of
0.5 at 0.0482, with seed 1 (starts_1) at 0.0511. GPTQ for the teacher's
activations ended at 0.0689 with an older program. Shares of 0 and 0.75 in
order, weighed tokens, the order of columns and descent: lab log, 2026-11-26.
"""

from experiments.configs import gemma3_270m_small

get_config = gemma3_270m_small.get_config


def sweep(add) -> None:
  for start in ('reference', 'search'):
    add(start, {
        'quant.start': start,
        'optimizer.learning_rate': gemma3_270m_small.REFERENCE_RATE,
    })
  for share in (0.0, 0.25, 0.5, 0.75):
    add(f'gptq_{share:g}', {'quant.error_propagation': share})
