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

P = jax.sharding.PartitionSpec
# Logits that exist at once take no more than this, in bytes.
_LARGEST = 2**31


class Placement(NamedTuple):
  """How the operands of `linear_kl` are cut over a mesh.

  Attributes:
    mesh: the devices.
    tokens: mesh axes that part the tokens among them.
    vocabulary: mesh axis that parts the rows of the heads.
    width: mesh axis that parts their columns; gathered block by block.
  """

  mesh: jax.sharding.Mesh
  tokens: tuple[str, ...]
  vocabulary: str
  width: str


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
    dtype=jnp.bfloat16,
    train_head: bool = False,
    placement: Placement | None = None,
):
  """Forward KL(teacher || student) over the whole vocabulary.

  Goes through the vocabulary once, block by block, with running maxima and
  sums as flash attention has them. When it is differentiated, the same pass
  also sums the probability-weighted rows of the head, whose difference is the
  gradient w.r.t. the hidden states: four products with a head in all, no
  logits kept or computed again, each block of the head read once. Only a
  trained head needs a second pass, for its own gradient.

  On a mesh every device goes through its part of the vocabulary with its part
  of the tokens; the sums are merged once, at the end.

  Args:
    student: [T, D] hidden states after the final norm.
    teacher: [T, D'] hidden states; get no gradient.
    student_head: [V, D], or a tree of arrays [V, ...] of which `rows` makes
      that: a quantized head is dequantized one block at a time.
    teacher_head: [V, D']; gets no gradient.
    rows: part of `student_head`, some rows of each array -> [rows, D].
    block: vocabulary entries whose logits exist at once, 8 T bytes each;
      chosen by `choose_block` when None.
    dtype: of the operands of the products; all else is float32.
    train_head: whether `student_head` gets a gradient.
    placement: how all of it lies on several devices.

  Returns:
    float32 [T], in nats.
  """
  stop = lax.stop_gradient
  if not train_head:
    student_head = jax.tree.map(stop, student_head)
  # The scale of a row is one number: nothing to cut there.
  is_cut = tuple(x.shape[-1] > 1 for x in jax.tree.leaves(student_head))
  how = _How(rows, block, dtype, train_head, placement, is_cut)
  return _linear_kl(
      student, stop(teacher), student_head, stop(teacher_head), how
  )


def choose_block(tokens: int, width: int) -> int:
  """Says how many vocabulary entries to take at a time.

  A block costs one reading and writing of the sums, 2 x [T, D], beside its
  logits, 2 x [T, block]: from three times the width on the former are the
  smaller part. More only takes memory.

  Args:
    tokens: T, on one device.
    width: D.
  """
  block = 1 << (3 * width - 1).bit_length()
  while block > 512 and 8 * tokens * block > _LARGEST:
    block //= 2
  return block


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
  """Sums over the vocabulary so far; e = exp(logit - running maximum).

  Row 0 of the first axis is the student's, row 1 the teacher's.

  maximum [2, T]; mass [2, T]: of e; gap [T]: of the teacher's e times
  (teacher's - student's logit); rows [2, T, D]: of e times the student head's
  row, None when no gradient is wanted.
  """

  maximum: jax.Array
  mass: jax.Array
  gap: jax.Array
  rows: jax.Array | None


class _How(NamedTuple):
  """The arguments of `linear_kl` that are no arrays."""

  rows: Callable[[Any], jax.Array]
  block: int | None
  dtype: Any
  train_head: bool
  placement: Placement | None
  # Of each leaf of the student's head: whether its last axis is parted.
  is_cut: tuple[bool, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _linear_kl(student, teacher, head, teacher_head, how):
  def value(*operands):
    sums = _merge(_pass(*operands, how, with_rows=False), how)
    return _kl(sums)

  value = _on_mesh(value, how, head, lambda tokens: P(tokens))
  return value(student, teacher, head, teacher_head)


def _forward(student, teacher, head, teacher_head, how):
  def value_and_slope(*operands):
    sums = _pass(*operands, how, with_rows=True)
    merged = _merge(sums, how)
    share = jnp.exp(sums.maximum - merged.maximum) / merged.mass
    mean = sums.rows * share[..., None]
    # Difference first: one sum over the devices of [T, D], not two.
    slope = _sum_over_vocabulary(mean[0] - mean[1], how)
    log_z = merged.maximum + jnp.log(merged.mass)
    return _kl(merged), slope.astype(operands[0].dtype), log_z

  value_and_slope = _on_mesh(
      value_and_slope, how, head,
      lambda tokens: (P(tokens), P(tokens, None), P(None, tokens)),
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

  gradient = _on_mesh(
      gradient, how, head,
      lambda tokens: _floats(_head_specs(head, how), _is_float(head)),
      more=lambda tokens: (P(None, tokens), P(tokens)),
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


def _pass(student, teacher, head, teacher_head, how, with_rows):
  """Goes through this device's vocabulary once; returns the sums."""
  student, teacher = student.astype(how.dtype), teacher.astype(how.dtype)
  tokens, width = student.shape
  sums = _Sums(
      jnp.full((2, tokens), -jnp.inf), jnp.zeros((2, tokens)),
      jnp.zeros((tokens,)),
      jnp.zeros((2, tokens, width)) if with_rows else None,
  )

  def body(sums, heads):
    node, teacher_rows = _gather(heads, how)
    rows = how.rows(node).astype(how.dtype)
    # Student and teacher apart, not stacked: a tenth faster on a CPU.
    s = _dot(student, rows, 1, 1)
    t = _dot(teacher, teacher_rows.astype(how.dtype), 1, 1)
    both = lambda f, *pair: jnp.stack([f(x) for x in pair])
    maximum = jnp.maximum(sums.maximum, both(lambda x: jnp.max(x, -1), s, t))
    shrink = jnp.exp(sums.maximum - maximum)
    e_s = jnp.exp(s - maximum[0][:, None])
    e_t = jnp.exp(t - maximum[1][:, None])
    new = _Sums(
        maximum,
        sums.mass * shrink + both(lambda x: jnp.sum(x, -1), e_s, e_t),
        sums.gap * shrink[1] + jnp.sum(e_t * (t - s), axis=-1),
        None,
    )
    if with_rows:
      more = both(lambda x: _dot(x.astype(how.dtype), rows, 1, 0), e_s, e_t)
      new = new._replace(rows=sums.rows * shrink[..., None] + more)
    return new, None

  block = how.block or choose_block(tokens, width)
  return _over_blocks(body, sums, (head, teacher_head), block)[0]


def _kl(sums):
  log_z = sums.maximum + jnp.log(sums.mass)
  return sums.gap / sums.mass[1] - log_z[1] + log_z[0]


def _head_gradient(student, teacher, head, teacher_head, log_z, g, how):
  """Returns the gradients of the head's float leaves, in their dtypes."""
  student, teacher = student.astype(how.dtype), teacher.astype(how.dtype)
  is_float = _is_float(head)

  def body(carry, heads):
    node, teacher_rows = _gather(heads, how)
    floats = _floats(node, is_float)
    rows, pull_back = jax.vjp(
        lambda floats: how.rows(_with_floats(node, floats, is_float)), floats
    )
    p = jnp.exp(_dot(student, rows.astype(how.dtype), 1, 1)
                - log_z[0][:, None])
    t = _dot(teacher, teacher_rows.astype(how.dtype), 1, 1)
    p -= jnp.exp(t - log_z[1][:, None])
    p = (p * g[:, None]).astype(how.dtype)
    (found,) = pull_back(_dot(p.T, student, 1, 0).astype(rows.dtype))
    cut = [c for c, f in zip(how.is_cut, is_float) if f]
    return carry, [_scatter(x, c, how) for x, c in zip(found, cut)]

  block = how.block or choose_block(*student.shape)
  return _over_blocks(body, (), (head, teacher_head), block)[1]


def _is_float(tree):
  return [
      jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(tree)
  ]


def _floats(tree, is_float):
  """The leaves that have gradients."""
  return [x for x, f in zip(jax.tree.leaves(tree), is_float) if f]


def _with_floats(tree, floats, is_float):
  """The tree with other float leaves."""
  leaves, structure = jax.tree.flatten(tree)
  floats = iter(floats)
  return jax.tree.unflatten(
      structure, [next(floats) if f else x for x, f in zip(leaves, is_float)]
  )


def _on_mesh(function, how, head, out_specs, more=lambda tokens: ()):
  """Lets every device of a mesh do its part; without one, the function."""
  p = how.placement
  if p is None:
    return function
  tokens = P(p.tokens, None)
  return jax.shard_map(
      function,
      mesh=p.mesh,
      in_specs=(
          tokens, tokens, _head_specs(head, how), P(p.vocabulary, p.width),
          *more(p.tokens),
      ),
      out_specs=out_specs(p.tokens),
      check_vma=False,
  )


def _head_specs(head, how):
  p = how.placement
  specs = [P(p.vocabulary, p.width if cut else None) for cut in how.is_cut]
  return jax.tree.unflatten(jax.tree.structure(head), specs)


def _gather(heads, how):
  """Gets the other devices' columns of some rows of the heads."""
  p = how.placement
  if p is None or p.mesh.shape[p.width] == 1:
    return heads
  leaves, structure = jax.tree.flatten(heads)
  return jax.tree.unflatten(structure, [
      lax.all_gather(x, p.width, axis=x.ndim - 1, tiled=True) if cut else x
      for x, cut in zip(leaves, (*how.is_cut, True), strict=True)
  ])


def _scatter(gradient, is_cut, how):
  """Sums over the tokens of all devices, to the columns that are held here."""
  p = how.placement
  if p is None:
    return gradient
  if not is_cut:
    return lax.psum(gradient, p.tokens)
  rest = tuple(a for a in p.tokens if a != p.width)
  return lax.psum(
      lax.psum_scatter(
          gradient, p.width, scatter_dimension=gradient.ndim - 1, tiled=True
      ),
      rest,
  )


def _merge(sums, how):
  """Adds up what the parts of the vocabulary found; rows are left out."""
  if how.placement is None:
    return sums
  axis = how.placement.vocabulary
  maximum = lax.pmax(sums.maximum, axis)
  shrink = jnp.exp(sums.maximum - maximum)
  return _Sums(
      maximum,
      lax.psum(sums.mass * shrink, axis),
      lax.psum(sums.gap * shrink[1], axis),
      None,
  )


def _sum_over_vocabulary(x, how):
  return x if how.placement is None else lax.psum(x, how.placement.vocabulary)


def _over_blocks(body, carry, arrays, block):
  """Scans body over blocks of leading rows; the last may be smaller."""
  length = len(jax.tree.leaves(arrays)[0])
  block = min(block, length)
  whole = length // block * block
  cut = lambda x: x[:whole].reshape(-1, block, *x.shape[1:])
  carry, out = lax.scan(body, carry, jax.tree.map(cut, arrays))
  out = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), out)
  if whole < length:
    carry, rest = body(carry, jax.tree.map(lambda x: x[whole:], arrays))
    out = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), out, rest)
  return carry, out


def _dot(x, y, axis_x, axis_y):
  return lax.dot_general(
      x, y, (((axis_x,), (axis_y,)), ((), ())),
      preferred_element_type=jnp.float32,
  )
