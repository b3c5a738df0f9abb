"""How far is the student's distribution from the teacher's, token by token?

One product with the head gives 262,144 logits a token: 1 MiB in float32. The
functions here take hidden states and heads, and hold the logits of one block
of the vocabulary at a time. They return per-token float32; the caller masks
and reduces.
"""

import functools
from typing import Any, Callable, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from gemma_qat import heads

P = jax.sharding.PartitionSpec
# What is kept of logits at a time takes no more than this, in bytes.
ROOM = 2**31


def as_it_is(node):
  """The rows of a head that is a plain array."""
  return node


def linear_kl(
    student,
    teacher,
    student_head,
    teacher_head,
    *,
    rows: Callable[[Any], jax.Array] = as_it_is,
    block: int | None = None,
    room: int = ROOM,
    dtype=jnp.bfloat16,
    train_head: bool = False,
    placement: heads.Placement | None = None,
):
  """Forward KL(teacher || student) over the whole vocabulary.

  Goes through the vocabulary block by block, for as many tokens at a time as
  memory allows. When it is differentiated, the first pass keeps the
  exponentials of the logits, a block at its own maximum, in `dtype`; a second
  one weighs the rows of the head with the difference of the probabilities,
  which is the gradient w.r.t. the hidden states: three products in all, no
  logits computed again. Only a trained head computes them once more, for its
  own gradient.

  On a mesh every device goes through its part of the vocabulary with its part
  of the tokens; what they found is merged once for all blocks.

  Args:
    student: [T, D] hidden states after the final norm.
    teacher: [T, D'] hidden states; get no gradient.
    student_head: [V, D], or a tree of arrays [V, ...] of which `rows` makes
      that: a quantized head is dequantized one block at a time.
    teacher_head: [V, D']; gets no gradient.
    rows: part of `student_head`, some rows of each array -> [rows, D].
    block: vocabulary entries that one round reads; chosen by `choose_block`
      when None.
    room: bytes of exponentials that are kept at a time, on one device.
    dtype: of the operands of the products; all else is float32.
    train_head: whether `student_head` gets a gradient.
    placement: how all of it lies on several devices.

  Returns:
    float32 [T], in nats.
  """
  stop = lax.stop_gradient
  if not train_head:
    student_head = jax.tree.map(stop, student_head)
  is_cut = tuple(heads.is_cut(student_head))
  how = _How(rows, block, room, dtype, train_head, placement, is_cut)
  return _linear_kl(
      student, stop(teacher), student_head, stop(teacher_head), how
  )


def choose_block(tokens: int, width: int, room: int = ROOM) -> int:
  """Says how many vocabulary entries to take at a time.

  A block costs one reading and writing of the gradient, [T, D], beside its
  exponentials, 2 x [T, block]: from three times the width on the former is the
  smaller part. More only takes memory.

  Args:
    tokens: T, on one device.
    width: D.
    room: bytes that two blocks of logits may take.
  """
  block = 1 << (3 * width - 1).bit_length()
  while block > 512 and 8 * tokens * block > room:
    block //= 2
  return block


def choose_tokens(
    tokens: int, vocabulary: int, dtype, room: int = ROOM
) -> int:
  """Says for how many tokens at a time exponentials are kept.

  Args:
    tokens: T, on one device.
    vocabulary: entries on one device.
    dtype: what the exponentials are kept in.
    room: bytes for them.
  """
  kept = 2 * vocabulary * jnp.dtype(dtype).itemsize
  rounds = -(-tokens * kept // room)
  return max(-(-tokens // rounds), min(tokens, 128))


def kl_from_logits(student_logits, teacher_logits):
  """Forward KL from materialised logits, the plain definition.

  Args:
    student_logits: [..., V].
    teacher_logits: [..., V].

  Returns:
    float32 [...], in nats.
  """
  log_q = jax.nn.log_softmax(student_logits.astype(jnp.float32))
  log_p = jax.nn.log_softmax(teacher_logits.astype(jnp.float32))
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def masked_mean(values, mask):
  """Averages values [...] where mask [...] is set; 0 where none is."""
  mask = mask.astype(values.dtype)
  return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


class _Sums(NamedTuple):
  """Sums over some of the vocabulary; e = exp(logit - maximum).

  Row 0 of the second to last axis is the student's, row 1 the teacher's.

  maximum [..., 2, T]; mass [..., 2, T]: of e; gap [..., T]: of the teacher's e
  times (teacher's - student's logit).
  """

  maximum: jax.Array
  mass: jax.Array
  gap: jax.Array


class _How(NamedTuple):
  """The arguments of `linear_kl` that are no arrays."""

  rows: Callable[[Any], jax.Array]
  block: int | None
  room: int
  dtype: Any
  train_head: bool
  placement: heads.Placement | None
  # Of each leaf of the student's head: whether its last axis is parted.
  is_cut: tuple[bool, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _linear_kl(student, teacher, head, teacher_head, how):
  def value(*operands):
    found = _read(*operands, how, keep=False)
    return _kl(_merge(_total([sums for sums, _ in found]), how))

  value = heads.on_mesh(value, how.placement, head, lambda tokens: P(tokens))
  return value(student, teacher, head, teacher_head)


def _forward(student, teacher, head, teacher_head, how):
  def some_tokens(student, teacher, pair):
    found = _read(student, teacher, *pair, how, keep=True)
    sums = _merge(_total([sums for sums, _ in found]), how)
    log_z = _log_z(sums)
    slope = _weigh(found, log_z, pair, student.shape, how)
    slope = _sum_over_vocabulary(slope, how).astype(student.dtype)
    return _kl(sums), slope, log_z.T

  def value_and_slope(student, teacher, *pair):
    size = choose_tokens(len(student), len(pair[1]), how.dtype, how.room)
    out = [
        lax.scan(lambda _, x: ((), some_tokens(*x, pair)), (), part)[1]
        for part in _cut((student, teacher), size)
    ]
    flat = lambda *xs: jnp.concatenate(
        [x.reshape(-1, *x.shape[2:]) for x in xs]
    )
    return jax.tree.map(flat, *out)

  value_and_slope = heads.on_mesh(
      value_and_slope, how.placement, head,
      lambda tokens: (P(tokens), P(tokens, None), P(tokens, None)),
  )
  kl, slope, log_z = value_and_slope(student, teacher, head, teacher_head)
  if not how.train_head:
    return kl, (slope, None)
  # A trained head needs the softmax once more on the way back.
  return kl, (slope, (log_z, student, teacher, head, teacher_head))


def _backward(how, saved, g):
  slope, rest = saved
  # Token i's loss depends on hidden state i alone.
  d_student = slope * g[:, None].astype(slope.dtype)
  if rest is None:
    return d_student, None, None, None
  log_z, student, teacher, head, teacher_head = rest

  def gradient(student, teacher, head, teacher_head, log_z, g):
    return _head_gradient(
        student, teacher, head, teacher_head, log_z, g, how
    )

  gradient = heads.on_mesh(
      gradient, how.placement, head,
      lambda tokens: heads.floats(
          heads.specs(head, how.placement), heads.is_float(head)
      ),
      more=lambda tokens: (P(tokens, None), P(tokens)),
  )
  found = gradient(student, teacher, head, teacher_head, log_z, g)
  # None where a leaf is of whole numbers, which have no gradient.
  leaves = iter(found)
  d_head = jax.tree.map(
      lambda x: next(leaves) if jnp.issubdtype(x.dtype, jnp.floating) else None,
      head,
  )
  return d_student, None, d_head, None


_linear_kl.defvjp(_forward, _backward)


def _read(student, teacher, head, teacher_head, how, keep):
  """Reads this device's vocabulary once.

  Returns:
    [(sums of each block [n, ...], exponentials [n, T, block] of the student
    and of the teacher, in `dtype`, if they are to be kept)], one for each part
    that `_cut` makes.
  """
  student, teacher = student.astype(how.dtype), teacher.astype(how.dtype)

  def body(_, pair):
    node, teacher_rows = _gather(pair, how)
    # Student and teacher apart, not stacked: a tenth faster on a CPU.
    s = _dot(student, how.rows(node).astype(how.dtype), 1, 1)
    t = _dot(teacher, teacher_rows.astype(how.dtype), 1, 1)
    both = lambda f, *pair: jnp.stack([f(x) for x in pair])
    maximum = both(lambda x: jnp.max(x, -1), s, t)
    e_s = jnp.exp(s - maximum[0][:, None])
    e_t = jnp.exp(t - maximum[1][:, None])
    sums = _Sums(
        maximum,
        both(lambda x: jnp.sum(x, -1), e_s, e_t),
        jnp.sum(e_t * (t - s), axis=-1),
    )
    kept = _bits((e_s.astype(how.dtype), e_t.astype(how.dtype)))
    return (), (sums, kept if keep else None)

  block = how.block or choose_block(*student.shape, how.room)
  return [
      lax.scan(body, (), part)[1]
      for part in _cut((head, teacher_head), block)
  ]


def _weigh(found, log_z, pair, shape, how):
  """Sums the head's rows times (student's - teacher's probability), [T, D]."""

  def body(slope, x):
    pair, (sums, kept) = x
    e_s, e_t = _of_bits(kept, how.dtype)
    node, _ = _gather(pair, how)
    share = jnp.exp(sums.maximum - log_z)[..., None]
    p = e_s.astype(jnp.float32) * share[0] - e_t.astype(jnp.float32) * share[1]
    rows = how.rows(node).astype(how.dtype)
    return slope + _dot(p.astype(how.dtype), rows, 1, 0), None

  slope = jnp.zeros(shape)
  block = how.block or choose_block(*shape, how.room)
  for part, kept in zip(_cut(pair, block), found, strict=True):
    slope, _ = lax.scan(body, slope, (part, kept))
  return slope


def _total(parts):
  """Adds up the sums of blocks, which stand on the leading axes."""
  sums = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
  maximum = jnp.max(sums.maximum, axis=0)
  shrink = jnp.exp(sums.maximum - maximum[None])
  return _Sums(
      maximum,
      jnp.sum(sums.mass * shrink, axis=0),
      jnp.sum(sums.gap * shrink[:, 1], axis=0),
  )


def _log_z(sums):
  return sums.maximum + jnp.log(sums.mass)


def _kl(sums):
  log_z = _log_z(sums)
  return sums.gap / sums.mass[1] - log_z[1] + log_z[0]


def _head_gradient(student, teacher, head, teacher_head, log_z, g, how):
  """Returns the gradients of the head's float leaves, in their dtypes."""
  student, teacher = student.astype(how.dtype), teacher.astype(how.dtype)
  is_float = heads.is_float(head)

  def body(_, pair):
    node, teacher_rows = _gather(pair, how)
    floats = heads.floats(node, is_float)
    rows, pull_back = jax.vjp(
        lambda floats: how.rows(heads.with_floats(node, floats, is_float)),
        floats,
    )
    p = jnp.exp(_dot(student, rows.astype(how.dtype), 1, 1) - log_z[:, :1])
    t = _dot(teacher, teacher_rows.astype(how.dtype), 1, 1)
    p -= jnp.exp(t - log_z[:, 1:])
    p = (p * g[:, None]).astype(how.dtype)
    (found,) = pull_back(_dot(p.T, student, 1, 0).astype(rows.dtype))
    cut = [c for c, f in zip(how.is_cut, is_float) if f]
    return (), [heads.scatter(x, c, how.placement) for x, c in zip(found, cut)]

  block = how.block or choose_block(*student.shape, how.room)
  out = [
      lax.scan(body, (), part)[1] for part in _cut((head, teacher_head), block)
  ]
  flat = lambda *xs: jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in xs])
  return jax.tree.map(flat, *out)


def _gather(pair, how):
  """Gets the other devices' columns of some rows of both heads."""
  return heads.gather(pair, (*how.is_cut, True), how.placement)


def _merge(sums, how):
  """Adds up what the parts of the vocabulary found."""
  if how.placement is None:
    return sums
  axis = how.placement.vocabulary
  maximum = lax.pmax(sums.maximum, axis)
  shrink = jnp.exp(sums.maximum - maximum)
  return _Sums(
      maximum,
      lax.psum(sums.mass * shrink, axis),
      lax.psum(sums.gap * shrink[1], axis),
  )


def _sum_over_vocabulary(x, how):
  return x if how.placement is None else lax.psum(x, how.placement.vocabulary)


def _bits(tree):
  """bfloat16 as whole numbers of 16 bits, all else as it is.

  XLA on a CPU has no bfloat16 slices: it turns the whole of what a loop slices
  or fills into float32 and, where it is filled, back in every round. Keeping
  2 GB of exponentials so took half of the loss's time.
  """
  return jax.tree.map(
      lambda x: lax.bitcast_convert_type(x, jnp.uint16)
      if x.dtype == jnp.bfloat16 else x,
      tree,
  )


def _of_bits(tree, dtype):
  """Undoes `_bits` of arrays that were all of one dtype."""
  if dtype != jnp.bfloat16:
    return tree
  return jax.tree.map(lambda x: lax.bitcast_convert_type(x, dtype), tree)


def _cut(arrays, size):
  """Cuts leading axes into pieces of `size`, the last of which may be smaller.

  Returns:
    Trees with the pieces on a new leading axis; two if there is a remainder.
  """
  length = len(jax.tree.leaves(arrays)[0])
  size = min(size, length)
  whole = length // size * size
  pieces = lambda x, size: x.reshape(-1, size, *x.shape[1:])
  parts = [jax.tree.map(lambda x: pieces(x[:whole], size), arrays)]
  if whole < length:
    parts.append(
        jax.tree.map(lambda x: pieces(x[whole:], length - whole), arrays)
    )
  return parts


def _dot(x, y, axis_x, axis_y):
  return lax.dot_general(
      x, y, (((axis_x,), (axis_y,)), ((), ())),
      preferred_element_type=jnp.float32,
  )
