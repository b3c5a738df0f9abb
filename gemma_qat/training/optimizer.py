"""How do the trained leaves move, each group at its own rate?"""

from typing import Any, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gemma_qat import errors
from gemma_qat.quant import lattice
from gemma_qat.training import moments
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
    s: settings.OptimizerSettings,
    steps: int,
    groups: Mapping[str, str],
    plan: Mapping[str, lattice.Entry] | None = None,
) -> optax.GradientTransformation:
  """Makes warm-up, cosine, clipping and Adam or Adafactor for each group.

  Args:
    s: the settings.
    steps: length of the schedule.
    groups: path of every trained leaf -> name of its group.
    plan: from `student.make_plan`; for dampening.

  Returns:
    A transformation of flat dicts {path: float32 array}.

  Raises:
    UserError: dampening of masters whose scales are not trained.
  """
  schedule = make_schedule(s, steps)

  def make_group(multiplier, relative):
    direction = optax.chain(
        optax.clip_by_global_norm(s.clip) if s.clip else optax.identity(),
        _make_adafactor(s) if s.name == 'adafactor' else
        moments.scale_by_adam(s.b1, s.b2, s.epsilon, s.moments),
    )
    return optax.chain(
        relative_to_magnitude(direction) if relative else direction,
        optax.scale_by_learning_rate(lambda step: multiplier * schedule(step)),
    )

  # A group that holds block scales moves in proportion to them, its other
  # leaves do not: two transformations of one rate.
  labels = {
      path: name + ('/scale' if path.endswith('/scale') else '')
      for path, name in groups.items()
  }
  parts = optax.partition(
      {
          label: make_group(
              s.multipliers[label.removesuffix('/scale')],
              relative=label.endswith('/scale'),
          )
          for label in set(labels.values())
      },
      labels,
  )
  if s.dampening:
    parts = optax.chain(dampen(s.dampening, plan or {}, groups), parts)
  if s.average:
    parts = optax.chain(parts, keep_average(s.average))
  return parts


class Average(NamedTuple):
  """A running mean of parameters: steps so far, and {path: mean}."""

  count: jax.Array
  mean: dict[str, jax.Array]


def keep_average(decay: float) -> optax.GradientTransformation:
  """Keeps a running mean of the parameters; updates pass unchanged.

  The decay begins low, as (1 + t) / (10 + t), so that the start is forgotten.
  """
  def init(params):
    # A copy: the parameters are donated to the step.
    return Average(
        jnp.zeros((), jnp.int32), jax.tree.map(lambda x: x + 0, dict(params))
    )

  def update(updates, state, params=None):
    t = state.count.astype(jnp.float32)
    kept = jnp.minimum(decay, (1 + t) / (10 + t))
    mean = jax.tree.map(
        lambda m, x, u: kept * m + (1 - kept) * (x + u),
        state.mean, dict(params), dict(updates),
    )
    return updates, Average(state.count + 1, mean)

  return optax.GradientTransformation(init, update)


def averaged(state: Any) -> dict[str, jax.Array] | None:
  """Finds the running mean in an optimizer's state; None without one."""
  is_mean = lambda x: isinstance(x, Average)
  found = [
      x for x in jax.tree.leaves(state, is_leaf=is_mean) if is_mean(x)
  ]
  return found[0].mean if found else None


def dampen(
    strength: float, plan: Mapping[str, lattice.Entry], groups
) -> optax.GradientTransformation:
  """Adds to masters' gradients `strength` times their distance from a point.

  That of the lattice they round to: codes between two of which a master
  oscillates come to rest. Source: Nagel et al., Overcoming Oscillations in
  Quantization-Aware Training; its loss term, differentiated.
  """
  masters = {}
  for path, (fmt, mode, contraction) in plan.items():
    # Of low rank, the master itself stands still.
    leaf = path + '/master' if mode == 'learned' else path
    if mode not in ('learned', 'derived') or leaf not in groups:
      continue
    if mode == 'learned' and path + '/scale' not in groups:
      raise errors.UserError(
          f'config.optimizer.dampening needs the scale of {path} beside its '
          'master, but config.train.rules freezes it: train both, or set the '
          'dampening to 0.'
      )
    masters[leaf] = path, fmt, mode, contraction

  def lost(leaf, params):
    path, fmt, mode, contraction = masters[leaf]
    master = params[leaf]
    if mode == 'derived':
      return master - fmt.fake_quantize(master, contraction)
    return master - fmt.fake_quantize_learned(master, params[path + '/scale'])

  def update(updates, state, params=None):
    return {
        leaf: u + strength * lost(leaf, params) if leaf in masters else u
        for leaf, u in updates.items()
    }, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


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


def _make_adafactor(s):
  """Adafactor without a first moment, by optax.

  The second moment of the two largest axes, where both have 128 entries or
  more, is the product of their sums. Matrices are stored [.., outputs,
  inputs], those of attention with an axis of heads, those of the groups
  stacked; these other axes are smaller in every size of Gemma 3 and keep
  sums of their own:
    [G, N, H, D] keeps [G, N, H] and [G, N, D], one matrix a head;
    [G, D, N, H] keeps [G, N, H] and [G, D, N], the same;
    [G, F, D] keeps [G, F] and [G, D].
  That is below 0.01 bytes a weight in matrices. What has no two such axes
  (norm gains, most block scales) keeps 4 bytes.

  What was chosen: the decay of the paper, 1 - step^-0.8, but never above b2,
  so that it does not stand still; epsilon squared added to the squared
  gradient, which is Adam's floor of the root; the paper's bound of 1 on the
  root mean square of a leaf's update. b1 is not used: a first moment would
  take the memory that Adafactor is there to save. Rates are those of Adam,
  not relative to the weights.
  """
  def decay(step, exponent):
    return jnp.minimum(1 - (step + 1.0) ** -exponent, s.b2)

  return optax.chain(
      optax.scale_by_factored_rms(
          decay_rate=0.8, min_dim_size_to_factor=128, epsilon=s.epsilon**2,
          decay_rate_fn=decay,
      ),
      optax.clip_by_block_rms(1.0),
  )
