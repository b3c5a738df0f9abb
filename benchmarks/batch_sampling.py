"""Claim: texts sampled at once come many times as fast as one by one.

A batch of `gemma-qat generate-data` (`model.batch_sampling`) against batches of
one text, of random weights: the same program, the same texts. One line of JSON:

  python -m benchmarks.batch_sampling
  python -m benchmarks.batch_sampling --layers=0 --vocabulary=0 --tokens=1024 \
      --length=32 --repeats=1

float32 unless told otherwise: one row times a matrix of bfloat16 is slower on a
CPU, which would flatter the batch.
"""

import jax
import numpy as np

from benchmarks import measure
from benchmarks import training_step
from gemma_qat import sharding
from gemma_qat.model import batch_sampling
from gemma_qat.model import transformer


def main(argv=None):
  parser = measure.make_parser(__doc__, repeats=3)
  training_step.add_flags(
      parser, layers=6, vocabulary=16_384, tokens=512, length=32,
      dtype='float32',
  )
  a = parser.parse_args(argv)
  config = training_step.sizes(a)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  model = transformer.Transformer(
      config, dtype=training_step.resolved_dtype(a), remat='none'
  )
  params = jax.device_put(
      training_step.draw(config), sharding.replicated(mesh)
  )
  sample = batch_sampling.make_sampler(model, batch_sampling.Rules(
      length=a.length, stop_ids=(), forbidden=(), vocabulary=config.vocab_size
  ), mesh)
  rows = a.tokens // a.length
  keys = jax.random.split(jax.random.key(0), rows)
  ours = lambda: sample(params, [[2]] * rows, keys)
  other = lambda: [
      sample(params, [[2]], keys[i : i + 1])[0] for i in range(rows)
  ]
  check_equal(ours(), other())
  timed = measure.interleave(ours, other, a.repeats)
  measure.emit(
      f'sampling, {rows} texts at once against one by one',
      training_step.describe(a),
      measure.as_rates(timed, rows * (a.length - 1), 'tokens/s'),
  )


def check_equal(ours, other):
  """Another order of sums may turn a draw, and all behind it, now and then."""
  same = np.mean([np.array_equal(x, y) for x, y in zip(ours, other)])
  if same < 0.5:
    raise AssertionError(f'Only {same:.0%} of the texts are equal.')


if __name__ == '__main__':
  main()
