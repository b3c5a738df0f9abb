"""Runs side by side whose means can be worked out by hand."""

import copy

from gemma_qat.reporting import points
from tests.reporting import sample

CONFIG = {
    'name': 'sample', 'seed': 0, 'quant.start': 'gptq',
    'quant.rules': [['attn', 'q4_0']], 'optimizer.learning_rate': 1e-3,
    'train.batch_size': 2, 'train.length': 256,
}


def point(name, kld=0.15, factor=1.0, is_finished=True, **changes):
  """A run of 120 steps; `factor` scales its held-out KL of 0.6 and 0.2.

  `changes` are fields of CONFIG, with '__' for the dot.
  """
  config = CONFIG | {k.replace('__', '.'): v for k, v in changes.items()}
  rows = [
      r | ({'heldout_kl_nats': factor * r['heldout_kl_nats']}
           if 'heldout_kl_nats' in r else {})
      for r in sample.rows()
  ]
  if not is_finished:
    return points.make_point(
        name, config, rows[:41], None, 'stopped at step 40'
    )
  return points.make_point(name, config, rows, report(kld), 'finished')


def report(kld=0.15):
  made = copy.deepcopy(sample.make_report())
  made['kld']['qat'] = kld
  made['recovered_kld'] = 1 - kld / made['kld']['ptq']
  return made


def sweep():
  """Three seeds of GPTQ, one run of the reference rule, one not finished."""
  return [
      point('gptq-0', 0.12, seed=0),
      point('gptq-1', 0.15, 1.25, seed=1),
      point('gptq-2', 0.18, 0.75, seed=2),
      point('reference', 0.3, 1.5, quant__start='reference'),
      point('search', factor=1.1, is_finished=False, quant__start='search'),
  ]
