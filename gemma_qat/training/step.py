"""What does one optimizer step do?"""

import functools
from typing import Any, Callable, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gemma_qat import losses
from gemma_qat.training import student as student_lib


class State(NamedTuple):
  """What a step changes and a checkpoint keeps.

  step: int32 scalar, steps taken. trained: {leaf path: float32 array}.
  optimizer: optax state.
  """

  step: jax.Array
  trained: dict[str, jax.Array]
  optimizer: Any


def make_loss(
    student_model,
    teacher_model,
    kl_block: int | None,
    train_head: bool,
    placement: losses.Placement | None = None,
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

  Returns:
    loss(student tree, teacher tree, batch) -> mean KL in nats over the
    positions of `batch['mask']`; the batch holds int tokens [B, L].
  """

  def loss(student, teacher, batch):
    tokens = batch['tokens']
    target = teacher_model.apply({'params': teacher}, tokens)
    hidden = student_model.apply({'params': student}, tokens)
    kl = losses.linear_kl(
        hidden.reshape(-1, hidden.shape[-1]),
        target.reshape(-1, target.shape[-1]),
        student['embedding'],
        teacher['embedding'],
        rows=functools.partial(student_model.intercept, 'embedding'),
        block=kl_block,
        dtype=student_model.dtype,
        train_head=train_head,
        placement=placement,
    )
    return losses.masked_mean(kl, batch['mask'].reshape(-1))

  return loss


def make_step(
    loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    groups: Mapping[str, str],
):
  """Builds step(state, frozen, teacher, batch) -> (state, metrics).

  Metrics are scalars: `kl_nats` before the update and the gradient norm of
  each group.
  """

  def step(state: State, frozen, teacher, batch):
    def of_trained(trained):
      return loss(student_lib.join(trained, frozen), teacher, batch)

    kl, gradient = jax.value_and_grad(of_trained)(state.trained)
    updates, optimizer_state = optimizer.update(
        gradient, state.optimizer, state.trained
    )
    metrics = {'kl_nats': kl}
    for name in sorted(set(groups.values())):
      part = [g for p, g in gradient.items() if groups[p] == name]
      metrics[f'gradient_norm/{name}'] = optax.tree.norm(part)
    trained = optax.apply_updates(state.trained, updates)
    return State(state.step + 1, trained, optimizer_state), metrics

  return step


def init_state(trained, optimizer: optax.GradientTransformation) -> State:
  """Makes the state before the first step."""
  return State(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))
