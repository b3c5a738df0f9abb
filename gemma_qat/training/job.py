"""What stands ready when the loop begins?"""

from typing import Any, Callable, Mapping, NamedTuple, Sequence

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat import heads
from gemma_qat import hosts
from gemma_qat import sharding
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.model import config as model_config
from gemma_qat.model import transformer
from gemma_qat.model import weights
from gemma_qat.quant import lattice
from gemma_qat.training import calibration
from gemma_qat.training import codes
from gemma_qat.training import folding
from gemma_qat.training import gathering
from gemma_qat.training import machine
from gemma_qat.training import metrics
from gemma_qat.training import optimizer as optimizer_lib
from gemma_qat.training import propagation
from gemma_qat.training import saving
from gemma_qat.training import settings
from gemma_qat.training import starts
from gemma_qat.training import step as step_lib
from gemma_qat.training import student as student_lib


class Program(NamedTuple):
  """The compiled functions of a run.

  init(trained) -> state; step(state, settled, teacher, batch) -> (state,
  metrics), the state donated; score(trained, settled, teacher, batch) -> mean
  KL in nats; codes(trained, settled) -> {path: codes} of those that training
  can change, None where it can change none; schedule(step) -> learning rate.
  """

  init: Callable[..., step_lib.State]
  step: Callable[..., Any]
  score: Callable[..., jax.Array]
  codes: Callable[..., dict[str, jax.Array]] | None
  schedule: Callable[[int], Any]


class Job(NamedTuple):
  """What the loop needs: arrays on their devices, compiled functions.

  frozen is what checkpoints hold of the untrained leaves, settled what the
  step reads of them (see `student.settle`).
  """

  state: step_lib.State
  frozen: dict[str, Any]
  settled: dict[str, Any]
  teacher: dict[str, Any]
  program: Program
  trains_head: bool


def make_program(
    s: settings.Settings,
    mesh: jax.sharding.Mesh,
    config: model_config.ModelConfig,
    plan: Mapping[str, Any],
    groups: Mapping[str, str],
    trained: Mapping[str, Any],
) -> Program:
  """Builds the functions of a run; nothing is compiled or allocated yet.

  Args:
    s: the settings.
    mesh: the devices.
    config: the sizes.
    plan: from `student.settle`: what the step sees.
    groups: from `student.groups`.
    trained: the trained leaves, arrays or descriptions, on the mesh.
  """
  optimizer = optimizer_lib.make_optimizer(
      s.optimizer, s.train.steps, groups, plan
  )
  is_alone = mesh.size == 1
  moving = codes.moving(plan, groups)
  device = mesh.devices.flat[0]

  def model(intercept, plan):
    if is_alone:
      return machine.make_model(config, s.compute, intercept)
    gather = gathering.make_gather(
        intercept, plan, mesh, config, s.mesh.gather, s.compute.dtype
    )
    return machine.make_model(
        config, s.compute, gather, constrain=sharding.make_constrain(mesh)
    )

  make_loss = lambda options: step_lib.make_loss(
      model(lattice.make_intercept(plan, s.quant.straight_through), plan),
      model(transformer.identity, {}),
      s.compute.kl_block or None,
      train_head=_trains_head(groups),
      placement=None if is_alone else heads.Placement(
          mesh, ('data', 'fsdp'), 'tensor', 'fsdp'
      ),
      options=options,
      kl_room=machine.kl_room(device.platform, device.device_kind),
  )
  loss = make_loss(s.loss)
  init = lambda leaves: step_lib.init_state(leaves, optimizer)
  where = state_shardings(mesh, jax.eval_shape(init, trained), trained)
  everywhere = sharding.replicated(mesh)
  return Program(
      init=jax.jit(init, out_shardings=where),
      # Those of the arguments are their own.
      step=jax.jit(
          step_lib.make_step(loss, optimizer, groups, s.train.accumulate),
          donate_argnums=0, out_shardings=(where, everywhere),
      ),
      score=jax.jit(
          # Runs with other losses are compared by the KL as well.
          step_lib.make_score(make_loss(None), s.train.accumulate),
          out_shardings=everywhere,
      ),
      codes=jax.jit(codes.make_read(plan, moving)) if moving else None,
      schedule=optimizer_lib.make_schedule(s.optimizer, s.train.steps),
  )


def prepare(
    s: settings.Settings,
    mesh: jax.sharding.Mesh,
    base: checkpoints.Checkpoint,
    params: Mapping[str, Any] | None,
    plan: Mapping[str, Any],
    student: Mapping[str, Any],
    before: Job | None = None,
) -> Job:
  """Builds step and state around a student.

  Args:
    s: the settings.
    mesh: where everything lies.
    base: the checkpoint that was loaded.
    params: its tree, float32: the teacher. None where there is a job before.
    plan: from `student.make_plan`.
    student: tree of step 0, of a checkpoint or of the job before.
    before: the same run's, whose codes moved (`codes.freeze`); its teacher is
      kept, and what its optimizer knows (`codes.carry`).
  """
  config = base.config
  groups = student_lib.groups(student, s.train.rules)
  trained, frozen = student_lib.split(student, groups)
  settled, step_plan = student_lib.settle(frozen, plan)
  trained = _place(mesh, config, trained)
  program = make_program(s, mesh, config, step_plan, groups, trained)
  state = program.init(trained)
  if before is None:
    flat = traverse_util.flatten_dict(params, sep='/')
    flat = teacher_of(config, flat, s.compute)
    teacher = student_lib.join({}, _place(mesh, config, flat))
  else:
    teacher, state = before.teacher, codes.carry(state, before.state)
  return Job(
      state=state,
      # Of several processes the first saves what none has to itself.
      frozen={path: np.asarray(x) for path, x in frozen.items()},
      settled=_place(mesh, config, for_products(config, settled, s.compute)),
      teacher=teacher,
      program=program,
      trains_head=_trains_head(groups),
  )


def abstract(
    s: settings.Settings,
    mesh: jax.sharding.Mesh,
    config: model_config.ModelConfig,
):
  """Describes a run's step without any array: to compile it ahead of time.

  Args:
    s: the settings.
    mesh: of devices, or of a description of devices.
    config: the sizes.

  Returns:
    (Program, arguments of its step as ShapeDtypeStructs with shardings).

  Raises:
    UserError: rules or mesh do not fit the model.
  """
  plan = student_lib.make_plan(config, s.quant)
  starts.check_start(plan, s.quant.start)
  student = student_lib.abstract_student(config, plan)
  groups = student_lib.groups(student, s.train.rules)
  trained, frozen = student_lib.split(student, groups)
  # The plan that the step sees has no arrays in it: only paths decide.
  _, step_plan = student_lib.settle({p: None for p in frozen}, plan,
                                    dequantize=lambda *node: None)
  settled = jax.eval_shape(
      lambda leaves: for_products(
          config, student_lib.settle(leaves, plan)[0], s.compute
      ),
      frozen,
  )
  teacher = jax.eval_shape(
      lambda leaves: teacher_of(config, leaves, s.compute),
      student_lib.abstract_flat(config),
  )
  where = lambda flat: student_lib.shardings(mesh, config, flat)
  trained = _described(trained, where(trained))
  program = make_program(s, mesh, config, step_plan, groups, trained)
  state = jax.eval_shape(program.init, trained)
  shape = (s.train.batch_size, s.train.length)
  rows = sharding.named(mesh, ('batch', None))
  return program, (
      _described(state, state_shardings(mesh, state, trained)),
      _described(settled, where(settled)),
      student_lib.join({}, _described(teacher, where(teacher))),
      {
          'tokens': jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows),
          'mask': jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=rows),
      },
  )


def start(
    s: settings.Settings,
    base: checkpoints.Checkpoint,
    params: Mapping[str, Any],
    plan: Mapping[str, Any],
    calibrating: Callable[[], list[Mapping[str, Any]]],
) -> dict[str, Any]:
  """Makes the student of step 0, reading text where the start needs it."""
  if s.quant.start not in settings.STARTS:
    return starts.follow(
        base.config, params, plan, detect.load(s.quant.start)
    )
  in_order = s.quant.start == 'gptq' and s.quant.error_propagation
  inside = s.quant.fold or s.quant.start != 'reference' and not in_order
  head = in_order and 'embedding' in plan and (
      plan['embedding'][0].stored_as == 'q4_0'
  )
  grams = {}
  if inside or in_order:
    batches = [b['tokens'] for b in calibrating()]
    model = machine.make_model(base.config, s.compute, transformer.identity)
  if inside or head:
    total = sum(b.size for b in batches)
    with metrics.Progress('calibrate', total) as progress:
      grams = calibration.gather_grams(
          model, params, batches, on_batch=progress.advance,
          head_only=not inside,
      )
  if s.quant.fold:
    total = folding.places(base.config)
    with metrics.Progress('fold channels', total) as progress:
      params, grams = folding.fold(
          base.config, params, grams, plan,
          on_place=lambda path: progress.advance(text=path),
      )
  found = {}
  if in_order:
    found = _in_order(s, model, params, plan, grams, batches)
  with metrics.Progress(f'start: {s.quant.start}', len(plan)) as progress:
    return starts.init_student(
        base.config, params, plan, s.quant.start, grams,
        on_weight=lambda path: progress.advance(text=path), found=found,
    )


def _in_order(s, model, params, plan, grams, batches):
  """Codes and scales of all matrices; the embedding's come first."""
  table, found = params['embedding'], {}
  if 'embedding' in plan:
    fmt, _, contraction = plan['embedding']
    made = starts.coordinated(
        'embedding', table, weights.tree_specs(model.config)['embedding'],
        grams.get('embedding'), s.quant.start, fmt,
    )
    if made is not None:
      found['embedding'] = made
    table = fmt.dequantize(made or fmt.quantize(table, contraction))
  layers = model.config.num_layers
  with metrics.Progress(f'{s.quant.start}, layer by layer', layers) as progress:
    return found | propagation.round_in_order(
        model, params, table, plan, batches, s.quant.error_propagation,
        on_layer=lambda layer: progress.advance(text=f'layer {layer}'),
    )


def resume(
    job: Job,
    step: int,
    leaves: Mapping[str, np.ndarray],
    skipped: Sequence[int],
) -> Job:
  """Puts a job at a saved step, with the optimizer leaves saved there."""
  fresh = job.state.optimizer
  restored = saving.restore_optimizer(fresh, leaves)
  put = lambda tree, like: hosts.put(
      tree, jax.tree.map(lambda x: x.sharding, like)
  )
  return job._replace(
      state=job.state._replace(
          step=put(np.int32(step), job.state.step),
          optimizer=put(restored, fresh),
          skipped=put(np.asarray(skipped, np.int32), job.state.skipped),
      )
  )


def teacher_of(config, flat, compute):
  """The non-quantized checkpoint in bfloat16, as the products take it."""
  specs = weights.tree_specs(config)
  return {
      path: x.astype(jnp.bfloat16).astype(compute.dtype)
      if specs[path].contraction else x
      for path, x in flat.items()
  }


def for_products(config, flat, compute):
  """Casts frozen matrices once, since every product would."""
  specs = weights.tree_specs(config)
  return {
      path: x.astype(compute.dtype)
      if path in specs and specs[path].contraction else x
      for path, x in flat.items()
  }


def state_shardings(mesh, state, trained):
  """Says where a state lies: what the optimizer keeps of a parameter with it."""
  def place(path, leaf):
    for key in path:
      if (like := trained.get(getattr(key, 'key', None))) is not None:
        return sharding.of_statistics(like.sharding, like.shape, leaf.shape)
    return sharding.replicated(mesh)
  return jax.tree_util.tree_map_with_path(place, state)


def _trains_head(groups):
  return any(p.split('/')[0] == 'embedding' for p in groups)


def _place(mesh, config, flat):
  return hosts.put(flat, student_lib.shardings(mesh, config, flat))


def _described(tree, shardings):
  return jax.tree.map(
      lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
      tree, shardings,
  )
