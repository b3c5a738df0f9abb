"""What else can measure how far a student is from its teacher?

`losses.linear_kl` is the default, and the one that large runs want. These are
what it is compared with: they hold the logits of some tokens at a time, which
are computed anew for the gradient (four products with each head, not three).
"""

import functools
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import jax
from jax import lax
import jax.numpy as jnp

from gemma_qat import losses

# Arrays [tokens, V] in float32 that live at the same time, as a round figure,
# and what they may take together, in bytes.
_ARRAYS, _LARGEST = 8, 2**31


class Options(NamedTuple):
  """What a distance is made of.

  Attributes:
    terms: (name in `NAMES`, weight); the weighted sum is minimised.
    temperature: both logits are divided by it; the term is multiplied by its
      square, which keeps the size of gradients. Not of cross_entropy.
    top_k: how many of the teacher's entries the term 'top_k' sees.
  """

  terms: Sequence[tuple[str, float]]
  temperature: float = 1.0
  top_k: int = 64

  @property
  def is_plain(self) -> bool:
    """Whether it is the forward KL and nothing else."""
    return (
        [name for name, _ in self.terms] == ['forward_kl']
        and self.temperature == 1
    )


def reverse_kl(student, teacher):
  """KL(student || teacher): punishes what the teacher would not say."""
  return losses.kl_from_logits(teacher, student)


def jensen_shannon(student, teacher):
  """Mean of both KLs from the even mixture; never above log 2."""
  log_q, log_p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
  log_m = jnp.logaddexp(log_q, log_p) - jnp.log(2.0)
  gap = lambda log_x: jnp.sum(jnp.exp(log_x) * (log_x - log_m), axis=-1)
  return 0.5 * (gap(log_p) + gap(log_q))


def top_k(student, teacher, k: int):
  """Forward KL from the teacher's k likeliest entries, made to sum to 1.

  What stored teacher logits allow. Biased: its minimum is not the teacher but
  the teacher without a tail.
  """
  best, at = lax.top_k(teacher, k)
  log_p = jax.nn.log_softmax(best)
  log_q = jnp.take_along_axis(jax.nn.log_softmax(student), at, axis=-1)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def cross_entropy(student, labels):
  """-log q(label), of logits [..., V] and int labels [...]."""
  log_q = jax.nn.log_softmax(student)
  return -jnp.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]


def hidden(student, teacher):
  """Squared error of hidden states [..., D], in units of the teacher's square.
  """
  error = jnp.sum(jnp.square(student - teacher), axis=-1)
  return error / jnp.sum(jnp.square(teacher), axis=-1)


_OF_LOGITS: Mapping[str, Callable[..., jax.Array]] = {
    'forward_kl': losses.kl_from_logits,
    'reverse_kl': reverse_kl,
    'jensen_shannon': jensen_shannon,
}
NAMES = (*_OF_LOGITS, 'top_k', 'cross_entropy', 'hidden')


def linear(
    options: Options,
    student: jax.Array,
    teacher: jax.Array,
    student_head: jax.Array,
    teacher_head: jax.Array,
    labels: jax.Array,
    has_label: jax.Array,
    *,
    dtype: Any = jnp.bfloat16,
    tokens_at_a_time: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Weighted sum of distances, some tokens at a time.

  Args:
    options: which ones.
    student: [T, D] hidden states after the final norm.
    teacher: [T, D'] hidden states; get no gradient.
    student_head: [V, D]; stop its gradient if it is not trained.
    teacher_head: [V, D']; gets no gradient.
    labels: int [T], the next tokens of the text.
    has_label: bool [T]: where they are known; elsewhere the term
      'cross_entropy' is 0.
    dtype: of the operands of the products; all else is float32.
    tokens_at_a_time: chosen from the shapes when None.

  Returns:
    (float32 [T] weighted sum, float32 [T] forward KL without temperature, in
    nats and without gradient: what runs with other distances are compared by).
  """
  stop = lax.stop_gradient
  heads = student_head.astype(dtype), stop(teacher_head).astype(dtype)
  count = len(student)
  size = tokens_at_a_time or max(
      1, _LARGEST // (4 * _ARRAYS * len(student_head))
  )
  rounds = -(-count // size)
  fill = -count % rounds

  @jax.checkpoint
  def some(xs):
    return _distance(options, *xs, *heads, dtype)

  def cut(x):
    # Token i goes to round i % rounds: where tokens are parted among devices,
    # each has its share of every round.
    x = jnp.pad(x, ((0, fill), *((0, 0) for _ in x.shape[1:])))
    return jnp.moveaxis(x.reshape(-1, rounds, *x.shape[1:]), 1, 0)

  found = lax.map(
      some,
      tuple(map(cut, (student, stop(teacher), labels, has_label))),
  )
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(-1)[:count]
  total, kl = map(join, found)
  return total, stop(kl)


def next_tokens(tokens: jax.Array, mask: jax.Array):
  """Returns labels [B, L] of `linear`, and where there are any.

  Args:
    tokens: int [B, L].
    mask: bool [B, L], False at BOS and padding: no text to predict.
  """
  labels = jnp.roll(tokens, -1, axis=1)
  has_label = jnp.roll(mask, -1, axis=1).at[:, -1].set(False)
  return labels, has_label


def _distance(
    options, student, teacher, labels, has_label, head, teacher_head, dtype
):
  logits = lambda x, head: jnp.einsum(
      'td,vd->tv', x.astype(dtype), head, preferred_element_type=jnp.float32
  )
  s, t = logits(student, head), logits(teacher, teacher_head)
  warmth = options.temperature
  of_logits = {
      **_OF_LOGITS, 'top_k': functools.partial(top_k, k=options.top_k)
  }
  others = {
      'cross_entropy': lambda: jnp.where(
          has_label, cross_entropy(s, labels), 0.0
      ),
      'hidden': lambda: hidden(student, teacher),
  }
  total = jnp.zeros(len(student))
  for name, weight in options.terms:
    if name in of_logits:
      value = warmth**2 * of_logits[name](s / warmth, t / warmth)
    else:
      value = others[name]()
    total += weight * value
  return total, losses.kl_from_logits(s, t)
