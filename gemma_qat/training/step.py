"""What does one optimizer step do?"""

import functools
from typing import Any, Callable, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gemma_qat import distances
from gemma_qat import heads
from gemma_qat import losses
from gemma_qat.training import student as student_lib


class Sums(NamedTuple):
  """Sums over positions: what is minimised, KL in nats, and how many."""

  loss: jax.Array
  kl_nats: jax.Array
  count: jax.Array


class State(NamedTuple):
  """What a step changes and a checkpoint keeps.

  step: int32 scalar, batches seen. trained: {leaf path: float32 array}.
  optimizer: optax state. skipped: int32 [2], steps that changed nothing
  because of numbers that were not finite: how many in a row by now, and in all.
  """

  step: jax.Array
  trained: dict[str, jax.Array]
  optimizer: Any
  skipped: jax.Array


def make_loss(
    student_model,
    teacher_model,
    kl_block: int | None,
    train_head: bool,
    placement: heads.Placement | None = None,
    options: distances.Options | None = None,
    kl_room: int = losses.ROOM,
):
  """Builds the distance between student and teacher on one batch.

  The teacher is an argument like the batch: it is in no state and gets no
  gradient.

  Args:
    student_model: Transformer with the fake-quant intercept.
    teacher_model: Transformer without.
    kl_block: see `losses.linear_kl`.
    train_head: whether the student's embedding is trained.
    placement: see `losses.linear_kl`.
    options: another distance than the forward KL.
    kl_room: see `losses.linear_kl`.

  Returns:
    loss(student tree, teacher tree, batch) -> `Sums` over the positions of
    `batch['mask']`, so that parts of a batch add up to the whole; the batch
    holds int tokens [B, L].
  """
  rows = functools.partial(student_model.intercept, 'embedding')
  dtype = student_model.dtype

  def forward_kl(hidden, target, student, teacher, batch):
    del batch
    kl = losses.linear_kl(
        hidden, target, student['embedding'], teacher['embedding'],
        rows=rows, block=kl_block, room=kl_room, dtype=dtype,
        train_head=train_head, placement=placement,
    )
    return kl, kl

  def another(hidden, target, student, teacher, batch):
    head = rows(student['embedding'])
    labels = distances.next_tokens(batch['tokens'], batch['mask'])
    return distances.linear(
        options, hidden, target,
        head if train_head else jax.lax.stop_gradient(head),
        teacher['embedding'], *(x.reshape(-1) for x in labels), dtype=dtype,
    )

  is_plain = options is None or options.is_plain
  distance = forward_kl if is_plain else another

  def loss(student, teacher, batch):
    tokens = batch['tokens']
    target = teacher_model.apply({'params': teacher}, tokens)
    hidden = student_model.apply({'params': student}, tokens)
    flat = lambda x: x.reshape(-1, x.shape[-1])
    found = distance(flat(hidden), flat(target), student, teacher, batch)
    mask = batch['mask'].reshape(-1).astype(jnp.float32)
    return Sums(*(jnp.sum(x * mask) for x in found), jnp.sum(mask))

  return loss


def make_step(
    loss: Callable[..., Sums],
    optimizer: optax.GradientTransformation,
    groups: Mapping[str, str],
    accumulate: int = 1,
):
  """Builds step(state, frozen, teacher, batch) -> (state, metrics).

  Metrics are scalars: `loss` and `kl_nats` before the update, means over
  positions, the gradient norm of each group, and what `watching` reads:
  `skipped_in_row`, `skipped_steps` and `culprit`, the index of the first
  gradient among sorted paths that is not finite, -1 if none is.

  If loss or gradients are not finite, the step leaves parameters and optimizer
  as they were.

  Args:
    loss: from `make_loss`.
    optimizer: of flat dicts {leaf path: array}.
    groups: leaf path -> name of its group.
    accumulate: parts of the batch that are computed one after the other; see
      `_over_parts`.
  """

  def step(state: State, frozen, teacher, batch):
    # Of the whole batch: parts whose masks let more through weigh more. Known
    # before, so that no gradient has to be divided.
    count = jnp.maximum(jnp.sum(batch['mask']), 1)

    def of_trained(trained, part):
      sums = loss(student_lib.join(trained, frozen), teacher, part)
      return sums.loss / count, sums.kl_nats / count

    (value, kl), gradient = _over_parts(
        lambda part: jax.value_and_grad(of_trained, has_aux=True)(
            state.trained, part
        ),
        batch, accumulate,
    )
    updates, optimizer_state = optimizer.update(
        gradient, state.optimizer, state.trained
    )
    # One infinite entry makes its sum of squares infinite or NaN.
    squares = {p: jnp.sum(jnp.square(g)) for p, g in gradient.items()}
    is_bad = ~jnp.isfinite(jnp.stack([squares[p] for p in sorted(squares)]))
    is_fine = jnp.isfinite(value) & ~jnp.any(is_bad)
    in_row, in_all = state.skipped
    in_row = jnp.where(is_fine, 0, in_row + 1)
    in_all = in_all + ~is_fine
    metrics = {
        'loss': value, 'kl_nats': kl, 'skipped_in_row': in_row,
        'skipped_steps': in_all,
        'culprit': jnp.where(jnp.any(is_bad), jnp.argmax(is_bad), -1),
    }
    for name in sorted(set(groups.values())):
      part = [x for p, x in squares.items() if groups[p] == name]
      metrics[f'gradient_norm/{name}'] = jnp.sqrt(sum(part))
    # A choice between numbers, not between programs: it is fused with the
    # update, and no second copy of anything is made.
    trained, optimizer_state = jax.tree.map(
        lambda new, old: jnp.where(is_fine, new, old),
        (optax.apply_updates(state.trained, updates), optimizer_state),
        (state.trained, state.optimizer),
    )
    skipped = jnp.stack([in_row, in_all])
    return State(state.step + 1, trained, optimizer_state, skipped), metrics

  return step


def make_score(
    loss: Callable[..., Sums], accumulate: int = 1
):
  """Builds score(trained, frozen, teacher, batch) -> mean KL in nats.

  Computed in as many parts as a step, so that it needs no more memory.
  """

  def score(trained, frozen, teacher, batch):
    student = student_lib.join(trained, frozen)
    sums = _over_parts(
        lambda part: loss(student, teacher, part), batch, accumulate
    )
    return sums.kl_nats / jnp.maximum(sums.count, 1)

  return score


def init_state(trained, optimizer: optax.GradientTransformation) -> State:
  """Makes the state before the first step."""
  return State(
      jnp.zeros((), jnp.int32), trained, optimizer.init(trained),
      jnp.zeros(2, jnp.int32),
  )


def _over_parts(function, batch, parts):
  """Sums function(part) over parts of the batch, one after the other.

  Only the sums and what one part computes exist at a time. Row i belongs to
  part i % parts: consecutive rows lie on one device, which so has its share of
  every part and sends none of its rows away.
  """
  if parts == 1:
    return function(batch)
  cut = jax.tree.map(
      lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch
  )
  like = jax.eval_shape(function, jax.tree.map(lambda x: x[0], cut))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

  def body(sums, part):
    return jax.tree.map(jnp.add, sums, function(part)), None

  return jax.lax.scan(body, zeros, cut)[0]
