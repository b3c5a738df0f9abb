"""How does a run go, from the checkpoint to the trained student?

One page, in the order in which the data flow: checkpoint -> student ->
[text -> batch -> step] -> metrics -> Orbax.
"""

import contextlib
import os
import pathlib
import signal
import sys
import time

import jax
import ml_collections
import numpy as np

from gemma_qat import errors
from gemma_qat import sharding
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import orbax_files
from gemma_qat.model import weights
from gemma_qat.training import job as job_lib
from gemma_qat.training import metrics
from gemma_qat.training import saving
from gemma_qat.training import settings
from gemma_qat.training import student as student_lib
from gemma_qat.training import text as text_lib
from gemma_qat.training import workdir as workdir_lib


def train(config: ml_collections.ConfigDict, workdir: os.PathLike) -> int:
  """Runs a config from wherever its workdir stands to its last step.

  Args:
    config: see `experiments/configs/base.py`.
    workdir: receives everything; a run that was stopped there goes on.

  Returns:
    The last step, whose checkpoint is written.

  Raises:
    UserError: the config, the checkpoint, the text or the workdir do not fit.
    Stopped: on SIGTERM or Ctrl-C, after the step under way was saved.
  """
  workdir = pathlib.Path(workdir)
  s = settings.read(config)
  mesh = sharding.make_mesh(**config.mesh.to_dict())
  workdir_lib.claim(workdir, config)
  if saving.latest(workdir) == s.train.steps:
    _say(f'{workdir} holds the last step, {s.train.steps}, already.')
    return s.train.steps

  base = detect.load(config.model.checkpoint)
  plan = student_lib.make_plan(base.config, s.quant)
  _check_mesh(mesh, base.config, plan, s.train)
  # Wrong rules are found now, not after minutes of calibration.
  student_lib.check_start(plan, s.quant.start)
  student_lib.groups(student_lib.outline(base.config, plan), s.train.rules)
  _say(f'{base.source}: {base.config.variant}, {len(plan)} stacks of matrices '
       f'to quantize, {workdir_lib.device_name()}, {s.compute.dtype} products')
  params = weights.stack(base.config, checkpoints.dequantized(base))
  text = text_lib.read(config, base, workdir)

  with saving.Saver(workdir, s.train.keep) as saver, _StopSignal() as stop:
    # The one place that decides where the student comes from.
    optimizer_leaves = None
    if saver.latest is not None:
      student, optimizer_leaves, manifest = saver.restore(saver.latest)
      text.go_on(manifest, workdir)
      _say(f'Going on at step {saver.latest}.')
    else:
      student = job_lib.start(s, base, params, plan, text.calibrating)
    job = job_lib.prepare(s, mesh, base, params, plan, student)
    if optimizer_leaves is not None:
      job = job_lib.resume(job, saver.latest, optimizer_leaves)
    del params, student

    def save(state):
      manifest = orbax_files.manifest(
          base.config, plan, int(state.step), config.name
      )
      saver.save(
          state, job.frozen, manifest | text.state(),
          orbax_files.tokenizer_tree(base.tokenizer),
      )

    with contextlib.closing(metrics.Writer(workdir, int(job.state.step))) as writer:
      _go(s, mesh, job, text, writer, save, stop)
  return s.train.steps


def _go(s, mesh, job, text, writer, save, stop):
  """The loop itself: batch -> step -> metrics -> checkpoint."""
  state, schedule = job.state, job.schedule
  to_devices = lambda batch: jax.device_put(
      batch, sharding.named(mesh, ('batch', None))
  )

  def heldout_kl():
    return float(np.mean([
        job.score(state.trained, job.settled, job.teacher, to_devices(b))
        for b in text.heldout
    ]))

  first = int(state.step)
  if not first:
    writer.write(0, {'heldout_kl_nats': heldout_kl()})
  tokens_a_step = s.train.batch_size * s.train.length
  clock, since, said = time.monotonic(), first, ''
  with metrics.Progress('train', s.train.steps, first) as progress:
    for n in range(first + 1, s.train.steps + 1):
      state, scalars = job.step(
          state, job.settled, job.teacher, to_devices(next(text.batches))
      )
      last = n == s.train.steps
      row = {}
      if n % s.train.log_every == 0 or last:
        row = {k: float(v) for k, v in scalars.items()}
        rate = (n - since) * tokens_a_step / (time.monotonic() - clock)
        row |= {
            'learning_rate': float(schedule(n - 1)),
            'tokens': n * tokens_a_step,
            'tokens_per_second': rate,
        }
        said = f'kl {row["kl_nats"]:.4f} nats, {rate:.0f} tokens/s'
      if n % s.train.evaluate_every == 0 or last:
        row['heldout_kl_nats'] = heldout_kl()
      if row:
        _check_finite(n, row)
        writer.write(n, row)
      if n % s.train.checkpoint_every == 0 or last or stop.asked:
        save(state)
      if 'tokens_per_second' in row:
        # Evaluation and saving are not the step's time.
        clock, since = time.monotonic(), n
      progress.advance(text=said)
      if stop.asked and not last:
        raise errors.Stopped(
            f'Stopped after step {n}; the same command goes on.'
        )


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


def _say(text):
  print(text, file=sys.stderr, flush=True)


class _StopSignal:
  """Turns SIGTERM and the first Ctrl-C into a request to stop."""

  asked = False

  def __enter__(self):
    self._old = {}
    try:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._ask)
    except ValueError:
      pass  # Not the main thread: whoever runs us handles signals.
    return self

  def __exit__(self, *exception):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _ask(self, number, frame):
    del frame
    self.asked = True
    _say('Stopping after this step ...')
    signal.signal(number, self._old[number])
