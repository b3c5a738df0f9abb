"""What stands ready when the loop begins?"""

from typing import Any, Callable, Mapping, NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat import sharding
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.model import transformer
from gemma_qat.model import weights
from gemma_qat.quant import lattice
from gemma_qat.training import calibration
from gemma_qat.training import metrics
from gemma_qat.training import optimizer as optimizer_lib
from gemma_qat.training import saving
from gemma_qat.training import settings
from gemma_qat.training import step as step_lib
from gemma_qat.training import student as student_lib


class Job(NamedTuple):
  """What the loop needs: arrays on their devices, compiled functions.

  frozen is what checkpoints hold of the untrained leaves, settled what the
  step reads of them (see `student.settle`).
  """

  state: step_lib.State
  frozen: dict[str, Any]
  settled: dict[str, Any]
  teacher: dict[str, Any]
  step: Callable[..., Any]
  score: Callable[..., jax.Array]
  schedule: Callable[[int], Any]


def prepare(
    s: settings.Settings,
    mesh: jax.sharding.Mesh,
    base: checkpoints.Checkpoint,
    params: Mapping[str, Any],
    plan: Mapping[str, Any],
    student: Mapping[str, Any],
) -> Job:
  """Builds step and state around a student.

  Args:
    s: the settings.
    mesh: where everything lies.
    base: the checkpoint that was loaded.
    params: its tree, float32: the teacher.
    plan: from `student.make_plan`.
    student: tree of step 0 or of a checkpoint.
  """
  groups = student_lib.groups(student, s.train.rules)
  trained, frozen = student_lib.split(student, groups)
  optimizer = optimizer_lib.make_optimizer(s.optimizer, s.train.steps, groups)
  trained = _place(mesh, base.config, trained)
  state = _place_like(
      mesh, step_lib.init_state(trained, optimizer), trained
  )
  settled, step_plan = student_lib.settle(frozen, plan)
  settled = _place(mesh, base.config, _for_products(settled, base, s.compute))
  loss = step_lib.make_loss(
      settings.make_model(
          base.config, s.compute, lattice.make_intercept(step_plan)
      ),
      settings.make_model(base.config, s.compute, transformer.identity),
      s.compute.kl_block,
      train_head=any(p.split('/')[0] == 'embedding' for p in trained),
  )
  return Job(
      state=state,
      frozen=frozen,
      settled=settled,
      teacher=_teacher(mesh, base, params, s.compute),
      step=jax.jit(
          step_lib.make_step(loss, optimizer, groups, s.train.accumulate),
          donate_argnums=0,
          # The compiler would cut some of them otherwise, and the second step
          # be compiled anew for that.
          out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
      ),
      score=jax.jit(step_lib.make_score(loss, s.train.accumulate)),
      schedule=optimizer_lib.make_schedule(s.optimizer, s.train.steps),
  )


def start(
    s: settings.Settings,
    base: checkpoints.Checkpoint,
    params: Mapping[str, Any],
    plan: Mapping[str, Any],
    calibrating: Callable[[], list[Mapping[str, Any]]],
) -> dict[str, Any]:
  """Makes the student of step 0, reading text where the start needs it."""
  grams = None
  if s.quant.start != 'reference':
    batches = [b['tokens'] for b in calibrating()]
    model = settings.make_model(base.config, s.compute, transformer.identity)
    total = sum(b.size for b in batches)
    with metrics.Progress('calibrate', total) as progress:
      grams = calibration.gather_grams(
          model, params, batches, on_batch=progress.advance
      )
  with metrics.Progress(f'start: {s.quant.start}', len(plan)) as progress:
    return student_lib.init_student(
        base.config, params, plan, s.quant.start, grams,
        on_weight=lambda path: progress.advance(text=path),
    )


def resume(job: Job, step: int, leaves: Mapping[str, np.ndarray]) -> Job:
  """Puts a job at a saved step, with the optimizer leaves saved there."""
  fresh = job.state.optimizer
  restored = saving.restore_optimizer(fresh, leaves)
  restored = jax.tree.map(
      lambda x, like: jax.device_put(x, like.sharding), restored, fresh
  )
  return job._replace(
      state=job.state._replace(
          step=jax.device_put(
              jnp.asarray(step, jnp.int32), job.state.step.sharding
          ),
          optimizer=restored,
      )
  )


def _teacher(mesh, base, params, compute):
  """The non-quantized checkpoint in bfloat16, as the products take it."""
  specs = weights.tree_specs(base.config)
  flat = traverse_util.flatten_dict(params, sep='/')
  cast = {
      path: x.astype(jnp.bfloat16).astype(compute.dtype)
      if specs[path].contraction else x
      for path, x in flat.items()
  }
  return traverse_util.unflatten_dict(
      _place(mesh, base.config, cast), sep='/'
  )


def _for_products(flat, base, compute):
  """Casts frozen matrices once, since every product would."""
  specs = weights.tree_specs(base.config)
  return {
      path: x.astype(compute.dtype)
      if path in specs and specs[path].contraction else x
      for path, x in flat.items()
  }


def _place(mesh, config, flat):
  return jax.device_put(flat, student_lib.shardings(mesh, config, flat))


def _place_like(mesh, state, trained):
  """Puts what the optimizer keeps of a parameter where the parameter is."""
  def place(path, leaf):
    for key in path:
      if (like := trained.get(getattr(key, 'key', None))) is not None:
        return jax.device_put(leaf, sharding.of_statistics(
            like.sharding, like.shape, leaf.shape
        ))
    return jax.device_put(leaf, sharding.replicated(mesh))
  return jax.tree_util.tree_map_with_path(place, state)
