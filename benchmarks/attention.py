"""Claim: a local layer's attention costs its window, not the sequence.

Attention in blocks against that of the whole sequence under a mask (JAX's own
'xla' implementation), forward and backward, timed in turns. One line of JSON:

  python -m benchmarks.attention --length=2048 --window=512

The defaults are the local layers of the 270M model. On a GPU at full size:

  python -m benchmarks.attention --length=32768 --window=1024 --heads=16 \
      --kv_heads=8 --dtype=bfloat16 --implementation=cudnn

--window=0 compares global layers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from gemma_qat.model import attention


def main(argv=None):
  parser = measure.make_parser(__doc__, repeats=7)
  add = parser.add_argument
  add('--batch', type=int, default=1)
  add('--length', type=int, default=1024)
  add('--window', type=int, default=512)
  add('--heads', type=int, default=4)
  add('--kv_heads', type=int, default=1)
  add('--head_dim', type=int, default=256)
  add('--dtype', default='float32')
  add('--implementation', choices=attention.IMPLEMENTATIONS,
      default='mapped' if jax.default_backend() == 'cpu' else 'blockwise')
  add('--against', choices=attention.IMPLEMENTATIONS, default='xla')
  a = parser.parse_args(argv)
  inputs = make_inputs(a)
  lowered = [
      make_program(name, a.window or None, a.dtype, inputs)
      for name in (a.implementation, a.against)
  ]
  ours, other = (program.compile() for program in lowered)
  check_equal(ours(*inputs), other(*inputs), a.dtype)
  layer = f'window of {a.window}' if a.window else 'global layer'
  measure.emit(
      f'attention, {layer}, forward and backward: {a.implementation} against '
      f'{a.against}',
      f'{a.batch} x {a.length:,} tokens, N {a.heads}, K {a.kv_heads}, '
      f'H {a.head_dim}, {a.dtype}',
      measure.interleave(
          lambda: ours(*inputs), lambda: other(*inputs), a.repeats
      ),
      ours_temporary_gb=measure.temporary_gb(lowered[0]),
      other_temporary_gb=measure.temporary_gb(lowered[1]),
  )


def make_inputs(a):
  draw = np.random.default_rng(0).standard_normal
  shape = lambda heads: (a.batch, a.length, heads, a.head_dim)
  q, k, v = (
      jnp.asarray(draw(shape(n), np.float32))
      for n in (a.heads, a.kv_heads, a.kv_heads)
  )
  return q * a.head_dim**-0.5, k, v


def make_program(implementation, window, dtype, inputs):
  """Attention and the gradients of a sum of its squares, lowered."""
  def total(q, k, v):
    out = attention.attend(q, k, v, window, dtype, implementation)
    return jnp.sum(jnp.square(out))
  step = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
  return step.lower(*inputs)


def check_equal(ours, other, dtype):
  """Two programs of different results are not worth a comparison."""
  tolerance = 1e-3 if dtype == 'float32' else 5e-2
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(other)):
    error = float(jnp.sqrt(jnp.mean(jnp.square(x - y))))
    size = float(jnp.sqrt(jnp.mean(jnp.square(y))))
    if not error <= tolerance * size:
      raise AssertionError(f'Results differ: {error} of {size}.')


if __name__ == '__main__':
  main()
