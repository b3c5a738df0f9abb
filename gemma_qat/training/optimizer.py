"""How do the trained leaves move, each group at its own rate?"""

from typing import Mapping

import jax
import jax.numpy as jnp
import optax

from gemma_qat.training import settings


def make_schedule(
    s: settings.OptimizerSettings, steps: int
) -> optax.Schedule:
  """Linear warm-up to the peak rate, then a cosine to 0 at the last step."""
  return optax.warmup_cosine_decay_schedule(
      init_value=0.0 if s.warmup_steps else s.learning_rate,
      peak_value=s.learning_rate,
      warmup_steps=s.warmup_steps,
      decay_steps=steps,
  )


def make_optimizer(
    s: settings.OptimizerSettings, steps: int, groups: Mapping[str, str]
) -> optax.GradientTransformation:
  """Adam with warm-up, cosine and clipping, separately for each group.

  Args:
    s: the settings.
    steps: length of the schedule.
    groups: path of every trained leaf -> name of its group.

  Returns:
    A transformation of flat dicts {path: float32 array}.
  """
  schedule = make_schedule(s, steps)

  def make_group(multiplier, relative):
    adam = optax.chain(
        optax.clip_by_global_norm(s.clip) if s.clip else optax.identity(),
        optax.scale_by_adam(b1=s.b1, b2=s.b2, eps=s.epsilon),
    )
    return optax.chain(
        relative_to_magnitude(adam) if relative else adam,
        optax.scale_by_learning_rate(lambda step: multiplier * schedule(step)),
    )

  # A group that holds block scales moves in proportion to them, its other
  # leaves do not: two transformations of one rate.
  labels = {
      path: name + ('/scale' if path.endswith('/scale') else '')
      for path, name in groups.items()
  }
  return optax.partition(
      {
          label: make_group(
              s.multipliers[label.removesuffix('/scale')],
              relative=label.endswith('/scale'),
          )
          for label in set(labels.values())
      },
      labels,
  )


def relative_to_magnitude(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Lets `inner` work on relative changes: a step of 0.01 is one percent.

  Block scales differ by orders of magnitude and must keep their sign. To first
  order this is `inner` on the logarithm of |parameter|, while the stored
  parameter stays the scale itself, so that what is exported is what was
  trained, without an exponential in between that rounds differently elsewhere.
  """

  def update(updates, state, params=None):
    magnitude = jax.tree.map(jnp.abs, params)
    updates = jax.tree.map(jnp.multiply, updates, magnitude)
    updates, state = inner.update(updates, state, params)
    return jax.tree.map(jnp.multiply, updates, magnitude), state

  return optax.GradientTransformation(inner.init, update)
