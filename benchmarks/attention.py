"""Claim: a local layer's attention costs its window, not the sequence.

Attention in blocks against that of the whole sequence under a mask (JAX's own
'xla' implementation), forward and backward, timed in turns. One line of JSON:

  python benchmarks/attention.py --length=2048 --window=512

The defaults are the local layers of the 270M model. On a GPU at full size:

  python benchmarks/attention.py --length=32768 --window=1024 --heads=16 \\
      --kv_heads=8 --dtype=bfloat16 --implementation=cudnn

--window=0 compares global layers.
"""

import argparse
import json
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.model import attention


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--length', type=int, default=1024)
  parser.add_argument('--window', type=int, default=512)
  parser.add_argument('--heads', type=int, default=4)
  parser.add_argument('--kv_heads', type=int, default=1)
  parser.add_argument('--head_dim', type=int, default=256)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument(
      '--implementation', choices=attention.IMPLEMENTATIONS,
      default='mapped' if jax.default_backend() == 'cpu' else 'blockwise',
  )
  parser.add_argument('--against', choices=attention.IMPLEMENTATIONS,
                      default='xla')
  parser.add_argument('--repeats', type=int, default=7)
  a = parser.parse_args()
  inputs = make_inputs(a)
  steps = [
      compiled(name, a.window or None, a.dtype, inputs)
      for name in (a.implementation, a.against)
  ]
  check_equal(*(step(*inputs) for step in steps), a.dtype)
  ours, other = interleaved_seconds(steps, inputs, a.repeats)
  ours_bytes, other_bytes = (
      step.memory_analysis().temp_size_in_bytes for step in steps
  )
  layer = f'window of {a.window}' if a.window else 'global layer'
  print(json.dumps({
      'what': f'attention, {layer}, forward and backward: '
              f'{a.implementation} against {a.against}',
      'shapes': {
          'B': a.batch, 'L': a.length, 'N': a.heads, 'K': a.kv_heads,
          'H': a.head_dim, 'dtype': a.dtype,
      },
      'device': device(),
      'ours': round(statistics.median(ours), 4),
      'other': round(statistics.median(other), 4),
      'unit': f'seconds, median of {a.repeats}',
      'ratio': round(statistics.median(other) / statistics.median(ours), 2),
      'ratio_least_and_most': [
          round(pick(o / u for o, u in zip(other, ours)), 2)
          for pick in (min, max)
      ],
      'ours_temporary_mb': round(ours_bytes / 1e6, 1),
      'other_temporary_mb': round(other_bytes / 1e6, 1),
  }))


def make_inputs(a):
  draw = np.random.default_rng(0).standard_normal
  shape = lambda heads: (a.batch, a.length, heads, a.head_dim)
  q, k, v = (
      jnp.asarray(draw(shape(n), np.float32))
      for n in (a.heads, a.kv_heads, a.kv_heads)
  )
  return q * a.head_dim**-0.5, k, v


def compiled(implementation, window, dtype, inputs):
  """Attention and the gradients of a sum of its squares, compiled."""
  def total(q, k, v):
    out = attention.attend(q, k, v, window, dtype, implementation)
    return jnp.sum(jnp.square(out))
  step = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
  return step.lower(*inputs).compile()


def check_equal(ours, other, dtype):
  """Two programs of different results are not worth a comparison."""
  tolerance = 1e-3 if dtype == 'float32' else 5e-2
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(other)):
    error = float(jnp.sqrt(jnp.mean(jnp.square(x - y))))
    size = float(jnp.sqrt(jnp.mean(jnp.square(y))))
    if not error <= tolerance * size:
      raise AssertionError(f'Results differ: {error} of {size}.')


def interleaved_seconds(steps, inputs, repeats):
  """Times each in turn, so that what else the machine does hits all alike."""
  seconds = [[] for _ in steps]
  for _ in range(repeats):
    for step, taken in zip(steps, seconds):
      start = time.perf_counter()
      jax.block_until_ready(step(*inputs))
      taken.append(time.perf_counter() - start)
  return seconds


def device() -> str:
  kind = jax.devices()[0].device_kind
  return f'{os.cpu_count()}-core CPU' if kind == 'cpu' else kind


if __name__ == '__main__':
  main()
