"""How far is the student's distribution from the teacher's, token by token?

One product with the head gives 262,144 logits a token: 1 MiB in float32. The
functions here take hidden states and heads, and hold the logits of one chunk
of tokens at a time. They return per-token float32; the caller masks and
reduces.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp


def linear_kl(
    student,
    teacher,
    student_head,
    teacher_head,
    *,
    chunk: int = 128,
    dtype=jnp.bfloat16,
    train_head: bool = False,
):
  """Forward KL(teacher || student) over the whole vocabulary.

  With a frozen head the gradient w.r.t. the hidden states is formed together
  with the loss, out of the same logits: three products with a head in all,
  none recomputed, and no buffer for the head's own gradient. With a trained
  head the logits are computed again on the way back, since the head's gradient
  needs the cotangents.

  Args:
    student: [T, D] hidden states after the final norm.
    teacher: [T, D'] hidden states; get no gradient.
    student_head: [V, D].
    teacher_head: [V, D']; gets no gradient.
    chunk: tokens whose logits exist at once: 2 MiB of float32 each.
    dtype: of the operands of the products; all else is float32.
    train_head: whether `student_head` gets a gradient.

  Returns:
    float32 [T], in nats.
  """
  tokens = student.shape[0]
  chunk = min(chunk, tokens)
  padding = -tokens % chunk
  # A padded token has equal (zero) hidden states; its row is cut off below.
  student = jnp.pad(student, ((0, padding), (0, 0)))
  teacher = jnp.pad(lax.stop_gradient(teacher), ((0, padding), (0, 0)))
  teacher_head = lax.stop_gradient(teacher_head)
  if train_head:
    kl = _kl_trained_head(
        student, teacher, student_head, teacher_head, chunk, dtype
    )
  else:
    kl = _kl_frozen_head(
        student, teacher, lax.stop_gradient(student_head), teacher_head, chunk,
        dtype,
    )
  return kl[:tokens]


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _kl_frozen_head(student, teacher, head, teacher_head, chunk, dtype):
  def body(rows):
    return _chunk_kl(*rows, head, teacher_head, dtype)[0]
  return _map_chunks(body, (student, teacher), chunk)


def _frozen_forward(student, teacher, head, teacher_head, chunk, dtype):
  def body(rows):
    kl, slope = _chunk_kl(*rows, head, teacher_head, dtype)
    return kl, _product(slope(), head, dtype)
  kl, gradient = _map_chunks(body, (student, teacher), chunk)
  return kl, (gradient.astype(student.dtype), teacher, head, teacher_head)


def _frozen_backward(chunk, dtype, saved, g):
  del chunk, dtype
  gradient, *frozen = saved
  # Token i's loss depends on hidden state i alone.
  d_student = gradient * g[:, None].astype(gradient.dtype)
  return d_student, *map(jnp.zeros_like, frozen)


_kl_frozen_head.defvjp(_frozen_forward, _frozen_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _kl_trained_head(student, teacher, head, teacher_head, chunk, dtype):
  return _kl_frozen_head(student, teacher, head, teacher_head, chunk, dtype)


def _trained_forward(student, teacher, head, teacher_head, chunk, dtype):
  kl = _kl_frozen_head(student, teacher, head, teacher_head, chunk, dtype)
  return kl, (student, teacher, head, teacher_head)


def _trained_backward(chunk, dtype, saved, g):
  student, teacher, head, teacher_head = saved
  split = lambda x: x.reshape(-1, chunk, *x.shape[1:])

  def body(d_head, rows):
    s, t, weight = rows
    _, slope = _chunk_kl(s, t, head, teacher_head, dtype)
    slope = slope() * weight[:, None]
    d_head += _product(slope.T, s, dtype)
    return d_head, _product(slope, head, dtype)

  d_head, d_student = lax.scan(
      body,
      jnp.zeros(head.shape, jnp.float32),
      (split(student), split(teacher), split(g)),
  )
  return (
      d_student.reshape(student.shape).astype(student.dtype),
      jnp.zeros_like(teacher),
      d_head.astype(head.dtype),
      jnp.zeros_like(teacher_head),
  )


_kl_trained_head.defvjp(_trained_forward, _trained_backward)


def _map_chunks(body, arrays, chunk):
  """Applies body to slices of `chunk` leading rows, one after the other."""
  split = lambda x: x.reshape(-1, chunk, *x.shape[1:])
  out = lax.map(body, jax.tree.map(split, arrays))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def _chunk_kl(student, teacher, head, teacher_head, dtype):
  """The KL of one chunk [C], and what makes its slope w.r.t. the logits."""
  s = _product(student, head.T, dtype)
  t = _product(teacher, teacher_head.T, dtype)
  s_max = jnp.max(s, axis=-1, keepdims=True)
  t_max = jnp.max(t, axis=-1, keepdims=True)
  s_sum = jnp.sum(jnp.exp(s - s_max), axis=-1, keepdims=True)
  t_sum = jnp.sum(jnp.exp(t - t_max), axis=-1, keepdims=True)
  # In log space: sum p (log p - log q), with p normalised at the end.
  gap = jnp.sum(jnp.exp(t - t_max) * (t - s), axis=-1, keepdims=True) / t_sum
  kl = gap - (t_max + jnp.log(t_sum)) + (s_max + jnp.log(s_sum))
  def slope():
    return jnp.exp(s - s_max) / s_sum - jnp.exp(t - t_max) / t_sum
  return kl[:, 0], slope


def _product(x, y, dtype):
  return jnp.dot(
      x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32
  )
