"""Claim: the KL over the whole vocabulary costs little but its products.

Ours is `losses.linear_kl`, value and gradient. Other is, --against=

  products: its matrix products alone, block by block as it makes them, without
    softmax: two of logits, one that multiplies as many numbers with the rows
    of the head; with --train_head three more for the head's gradient.
  logits: `losses.kl_from_logits` of logits that exist all at once.

  python -m benchmarks.linear_kl --against=logits
  python -m benchmarks.linear_kl --tokens=32768 --width=2560 \
      --vocabulary=262144 --dtype=bfloat16
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from benchmarks import measure
from gemma_qat import losses
from gemma_qat.training import machine


def main(argv=None):
  parser = measure.make_parser(__doc__, repeats=5)
  add = parser.add_argument
  add('--against', default='products', choices=('products', 'logits'))
  add('--tokens', type=int, default=1024)
  add('--width', type=int, default=640)
  add('--vocabulary', type=int, default=32_768)
  add('--block', type=int,
      help='of the vocabulary, of both sides; chosen from the shapes if absent')
  add('--dtype', default='auto', help='of the products and the heads')
  add('--train_head', action='store_true')
  a = parser.parse_args(argv)
  dtype = jnp.dtype(machine.fast_dtype() if a.dtype == 'auto' else a.dtype)
  other = {'products': make_products, 'logits': make_materialised}[a.against]
  block = a.block or losses.choose_block(a.tokens, a.width)
  block = min(block, a.vocabulary)
  if a.vocabulary % block:
    parser.error(f'--vocabulary={a.vocabulary} must be a multiple of {block}.')
  arrays = _draw(a.tokens, a.width, a.vocabulary, dtype)
  lowered = [
      jax.jit(f(block, dtype, a.train_head)).lower(*arrays)
      for f in (make_ours, other)
  ]
  ours, other = (program.compile() for program in lowered)
  head = ', trained head' if a.train_head else ''
  measure.emit(
      'linear_kl and gradient against '
      f'{"its products alone" if a.against == "products" else "logits"}{head}',
      f'{a.tokens:,} tokens, D {a.width:,}, V {a.vocabulary:,}, '
      f'blocks of {block:,}, {dtype.name}',
      measure.interleave(
          lambda: ours(*arrays), lambda: other(*arrays), a.repeats
      ),
      ours_temporary_gb=measure.temporary_gb(lowered[0]),
      other_temporary_gb=measure.temporary_gb(lowered[1]),
  )


def make_ours(block, dtype, train_head):
  """Builds f(student, teacher, head, teacher head) -> (loss, gradients)."""
  device = jax.devices()[0]
  room = machine.kl_room(device.platform, device.device_kind)
  return _with_gradient(functools.partial(
      losses.linear_kl, block=block, room=room, dtype=dtype,
      train_head=train_head,
  ), train_head)


def make_materialised(block, dtype, train_head):
  """As `make_ours`, the plain way; takes a block and ignores it."""
  del block

  def kl(student, teacher, head, teacher_head):
    logits = lambda x, rows: jnp.dot(
        x.astype(dtype), rows.T, preferred_element_type=jnp.float32
    )
    return losses.kl_from_logits(
        logits(student, head), lax.stop_gradient(logits(teacher, teacher_head))
    )

  return _with_gradient(kl, train_head)


def make_products(block, dtype, train_head):
  """Builds a function of the same arrays that multiplies and no more."""

  def products(student, teacher, head, teacher_head):
    student, teacher = student.astype(dtype), teacher.astype(dtype)

    def body(total, heads):
      s, t = _dot(student, heads[0], 1, 1), _dot(teacher, heads[1], 1, 1)
      return total + _dot((s - t).astype(dtype), heads[0], 1, 0), None

    def head_body(carry, heads):
      s, t = _dot(student, heads[0], 1, 1), _dot(teacher, heads[1], 1, 1)
      p = (s - t).astype(dtype)
      return carry, _dot(p.T, student, 1, 0).astype(dtype)

    heads = jax.tree.map(
        lambda x: x.reshape(-1, block, x.shape[1]), (head, teacher_head)
    )
    total = lax.scan(body, jnp.zeros(student.shape), heads)[0]
    if train_head:
      return total, lax.scan(head_body, (), heads)[1]
    return total

  return products


def _with_gradient(kl, train_head):
  return jax.value_and_grad(
      lambda *arrays: jnp.mean(kl(*arrays)),
      argnums=(0, 2) if train_head else 0,
  )


def _draw(tokens, width, vocabulary, dtype):
  """Hidden states in float32, heads in dtype; logits of about unit spread."""
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, rows: jax.random.normal(key, (rows, width))
  heads = [
      (draw(k, vocabulary) * width**-0.5).astype(dtype) for k in keys[2:]
  ]
  return draw(keys[0], tokens), draw(keys[1], tokens), *heads


def _dot(x, y, axis_x, axis_y):
  return lax.dot_general(
      x, y, (((axis_x,), (axis_y,)), ((), ())),
      preferred_element_type=jnp.float32,
  )


if __name__ == '__main__':
  main()
