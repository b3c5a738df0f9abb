"""How does a run go, from the checkpoint to the trained student?

One page, in the order in which the data flow: checkpoint -> student ->
[text -> batch -> step] -> metrics -> Orbax.
"""

import contextlib
import dataclasses
import os
import pathlib

import jax
import ml_collections
import numpy as np

from gemma_qat import errors
from gemma_qat import hosts
from gemma_qat import sharding
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import orbax_files
from gemma_qat.model import weights
from gemma_qat.training import codes
from gemma_qat.training import job as job_lib
from gemma_qat.training import metrics
from gemma_qat.training import optimizer as optimizer_lib
from gemma_qat.training import saving
from gemma_qat.training import settings
from gemma_qat.training import speed as speed_lib
from gemma_qat.training import starts
from gemma_qat.training import stopping
from gemma_qat.training import student as student_lib
from gemma_qat.training import text as text_lib
from gemma_qat.training import tracing
from gemma_qat.training import watching
from gemma_qat.training import workdir as workdir_lib


def train(
    config: ml_collections.ConfigDict, workdir: os.PathLike, profile: int = 0
) -> int:
  """Runs a config from wherever its workdir stands to its last step.

  Args:
    config: see `experiments/configs/base.py`.
    workdir: receives everything; a run that was stopped there goes on.
    profile: how many steps to trace, from this session's third on, when all
      is compiled.

  Returns:
    The last step, whose checkpoint is written.

  Raises:
    UserError: the config, the checkpoint, the text or the workdir do not fit.
    Stopped: on SIGTERM or Ctrl-C, after the step under way was saved.
  """
  workdir = pathlib.Path(workdir)
  s = settings.read(config)
  mesh = sharding.make_mesh(s.mesh.data, s.mesh.fsdp, s.mesh.tensor)
  with contextlib.ExitStack() as held, hosts.together():
    if hosts.is_first():
      held.enter_context(workdir_lib.hold(workdir, 'train'))
      workdir_lib.claim(workdir, config)
    hosts.wait('claim')
    newest = saving.newest_whole(workdir)
    if newest == s.train.steps:
      hosts.say(f'{workdir} holds the last step, {newest}, already.')
    else:
      _train(config, s, mesh, workdir, newest, profile)
  return s.train.steps


def _train(config, s, mesh, workdir, newest, profile):
  """Goes on from step `newest`, or begins where that is None."""
  base = detect.load(config.model.checkpoint)
  base = dataclasses.replace(base, config=settings.sizes(config, base.config))
  plan = student_lib.make_plan(base.config, s.quant)
  _check_mesh(mesh, base.config, plan, s.train)
  # Wrong rules are found now, not after minutes of calibration.
  starts.check_start(plan, s.quant.start)
  if s.quant.start not in settings.STARTS:
    starts.check_followed(base.config, plan, detect.load(s.quant.start))
  student_lib.groups(student_lib.outline(base.config, plan), s.train.rules)
  if s.train.freeze_codes:
    codes.settings_when_frozen(
        s, student_lib.outline(base.config, codes.frozen_plan(plan))
    )
  hosts.say(
      f'{base.source}: {base.config.variant}, {len(plan)} stacks of matrices '
      f'to quantize, {workdir_lib.device_name()}, {s.compute.dtype} products'
  )
  params = weights.stack(base.config, checkpoints.dequantized(base))
  share = sharding.share(mesh, s.train.batch_size)
  text = text_lib.read(config, base, workdir, share)

  t = s.train
  with saving.Saver(workdir, t.keep, t.keep_best, t.keep_every) as saver:
    # The one place that decides where the student comes from.
    optimizer_leaves, manifest = None, {}
    if newest is not None:
      student, optimizer_leaves, manifest = saver.restore(newest)
      text.go_on(manifest, workdir)
      hosts.say(f'Going on at step {newest}.')
    else:
      student = job_lib.start(s, base, params, plan, text.calibrating)
      if not s.quant.fold:
        starts.check_made(base.config, params, student, plan, s.quant.start)
    first = newest or 0
    kind = metrics.Writer if hosts.is_first() else metrics.Silence
    with (
        # The row of step 0 comes after its checkpoint.
        contextlib.closing(kind(workdir, newest or None)) as writer,
        tracing.Trace(workdir, profile, first) as trace,
        # Before, there is nothing to save: a signal ends it at once.
        stopping.Signal() as stop,
    ):
      job = None
      for last, is_resting in _stages(s.train, first):
        if is_resting:
          if job is not None:
            student = codes.freeze(_whole_student(job), plan)
          plan = codes.frozen_plan(plan)
          s = codes.settings_when_frozen(s, student)
        job = job_lib.prepare(s, mesh, base, params, plan, student, job)
        watch = watching.Watch(
            sorted(job.state.trained), t.most_skipped, manifest.get('watch')
        )
        if optimizer_leaves is not None:
          job = job_lib.resume(
              job, first, optimizer_leaves, manifest.get('skipped', (0, 0))
          )
        del student
        optimizer_leaves = params = None

        def save(state, job=job, plan=plan, watch=watch, kl=None):
          said = orbax_files.manifest(
              base.config, plan, int(state.step), config.name
          )
          watch.settle()
          writer.sync()
          saver.save(
              state, job.frozen,
              said | text.state() | {
                  'watch': watch.state(), 'skipped': state.skipped.tolist(),
              },
              orbax_files.tokenizer_tree(base.tokenizer), kl,
          )

        if newest is None:
          # Finding codes takes minutes, of large models hours.
          save(job.state)
          newest = first
        speed = speed_lib.Speed(t, base.config, job.trains_head)
        job = _go(
            s, mesh, job, text, last, writer, save, stop, speed, trace, watch
        )
        manifest = {'watch': watch.state()}


def _stages(train, first):
  """[(last step, whether codes stand still by decree)] of what is left.

  A checkpoint of the step between two stages is still of the former.
  """
  rest = train.steps - round(train.freeze_codes * train.steps)
  stages = [(rest, False), (train.steps, True)]
  if rest == train.steps:
    return stages[:1]
  return stages if first <= rest else stages[1:]


def _whole_student(job):
  """The student as every process has it, of the running mean if there is one.
  """
  mean = optimizer_lib.averaged(job.state.optimizer)
  return student_lib.join(
      hosts.fetch(job.state.trained if mean is None else mean), job.frozen
  )


def _go(s, mesh, job, text, until, writer, save, stop, speed, trace, watch):
  """The loop itself: batch -> step -> metrics -> checkpoint.

  Returns the job as it stands after step `until`.
  """
  state, program = job.state, job.program
  rows = sharding.named(mesh, ('batch', None))
  to_devices = lambda batch: hosts.put_share(batch, rows)

  def heldout_kl():
    return float(np.mean([
        program.score(state.trained, job.settled, job.teacher, to_devices(b))
        for b in text.heldout
    ]))

  first = int(state.step)
  if not first:
    writer.write(0, {'heldout_kl_nats': heldout_kl()})
  said = ''
  speed.restart(first)
  with metrics.Progress(
      'train', s.train.steps, first, is_shown=hosts.is_first()
  ) as progress:
    for n in range(first + 1, until + 1):
      trace.before(n)
      last = n == s.train.steps
      is_logged = n % s.train.log_every == 0 or last
      before = None
      if is_logged and program.codes:
        before = program.codes(state.trained, job.settled)
      with watching.patience(f'the text of step {n}', s.train.stall_seconds):
        batch = to_devices(next(text.batches))
      state, scalars = program.step(state, job.settled, job.teacher, batch)
      trace.after(n, scalars)
      watch.after(n, scalars)
      row = {}
      if is_logged:
        watch.settle()
        row = watching.finite({
            k: float(v) for k, v in scalars.items() if k not in watching.NAMES
        }) | watch.row()
        row['learning_rate'] = float(program.schedule(n - 1))
        row |= speed.at(n)
        said = f'kl {float(scalars["kl_nats"]):.4f} nats, {speed.said}'
      if before is not None:
        row['flipped_codes'] = float(codes.share_that_differs(
            before, program.codes(state.trained, job.settled)
        ))
      mean = optimizer_lib.averaged(state.optimizer) if last else None
      if mean is not None:
        row['heldout_kl_nats_of_last'] = heldout_kl()
        state = state._replace(trained=mean)
      is_saved = n % s.train.checkpoint_every == 0 or last
      if n % s.train.evaluate_every == 0 or last or (
          # The best are chosen by it.
          is_saved and s.train.keep_best
      ):
        row['heldout_kl_nats'] = heldout_kl()
      if row:
        _check_finite(n, row)
        writer.write(n, row)
      # Several processes have to agree, which costs a wait.
      is_asked = stop.asked if jax.process_count() == 1 else (
          n % s.train.log_every == 0 and hosts.anyone(stop.asked)
      )
      if is_saved or is_asked:
        save(state, kl=row.get('heldout_kl_nats'))
      if 'tokens_per_second' in row:
        # Evaluation and saving are not the step's time.
        speed.restart(n)
      progress.advance(text=said)
      if is_asked and not last:
        raise errors.Stopped(
            f'Stopped after step {n}; the same command goes on.'
        )
  return job._replace(state=state)


def _check_mesh(mesh, config, plan, train):
  """Refuses a mesh that does not fit, before text is read or codes found."""
  name, size = 'config.train.batch_size', train.batch_size
  if train.accumulate > 1:
    name, size = f'{name} / accumulate', size // train.accumulate
  sharding.check(mesh, name, (size,), ('batch',))
  for path, spec in weights.tree_specs(config).items():
    sharding.check(
        mesh, path, spec.shape, spec.axes, block=32 if path in plan else 1
    )


def _check_finite(step, row):
  for name, value in row.items():
    if not np.isfinite(value):
      raise errors.UserError(
          f'{name} is {value} at step {step}: lower '
          'config.optimizer.learning_rate or lengthen warmup_steps, then start '
          'with a new --workdir.'
      )
