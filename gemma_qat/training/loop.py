"""How does a run go, from the checkpoint to the trained student?

One page, in the order in which the data flow: checkpoint -> student ->
[text -> batch -> step] -> metrics -> Orbax.
"""

import os
import pathlib
import signal
import sys
import time


from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gemma_qat import errors
from gemma_qat import sharding
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import orbax_files
from gemma_qat.data import pipeline
from gemma_qat.data import sources
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
  quant = settings.quant(config)
  train_s = settings.train(config)
  optimizer_s = settings.optimizer(config)
  compute = settings.compute(config)
  mesh = sharding.make_mesh(**config.mesh.to_dict())
  workdir_lib.claim(workdir, config)
  if saving.latest(workdir) == train_s.steps:
    _say(f'{workdir} holds the last step, {train_s.steps}, already.')
    return train_s.steps

  base = detect.load(config.model.checkpoint)
  plan = student_lib.make_plan(base.config, quant)
  _say(f'{base.source}: {base.config.variant}, {len(plan)} stacks of matrices '
       f'to quantize, {workdir_lib.device_name()}, {compute.dtype} products')
  params = weights.stack(base.config, checkpoints.dequantized(base))
  batches, heldout, calibrating, digest = _text(config, train_s, base, workdir)

  with saving.Saver(workdir, train_s.keep) as saver, _StopSignal() as stop:
    # The one place that decides where the student comes from.
    if saver.latest is not None:
      student, optimizer_leaves, manifest = saver.restore(saver.latest)
      if manifest['text'] != digest:
        raise errors.UserError(
            f'The text of {config.data.train} is not what --workdir={workdir} '
            'was trained on so far: bring it back, or choose a new workdir.'
        )
      batches.set_state(manifest['data'])
      _say(f'Going on at step {saver.latest}.')
    else:
      student = _start(quant, compute, base, params, plan, calibrating)
      optimizer_leaves = None

    groups = student_lib.groups(student, train_s.rules)
    trained, frozen = student_lib.split(student, groups)
    optimizer = optimizer_lib.make_optimizer(
        optimizer_s, train_s.steps, groups
    )
    schedule = optimizer_lib.make_schedule(optimizer_s, train_s.steps)
    trained = _place(mesh, base.config, trained)
    state = step_lib.init_state(trained, optimizer)
    if optimizer_leaves is not None:
      state = state._replace(
          step=jnp.asarray(saver.latest, jnp.int32),
          optimizer=saving.restore_optimizer(state.optimizer, optimizer_leaves),
      )
    state = _place_like(mesh, state, trained)

    settled, step_plan = student_lib.settle(frozen, plan)
    settled = _place(mesh, base.config, _for_products(settled, base, compute))
    teacher = _teacher(mesh, base, params, compute)
    del params
    student_model = settings.make_model(
        base.config, compute, lattice.make_intercept(step_plan)
    )
    teacher_model = settings.make_model(
        base.config, compute, transformer.identity
    )
    loss = step_lib.make_loss(
        student_model, teacher_model, compute.kl_block,
        train_head=any(p.split('/')[0] == 'embedding' for p in trained),
    )
    take_step = jax.jit(
        step_lib.make_step(loss, optimizer, groups), donate_argnums=0
    )
    score = jax.jit(
        lambda trained, settled, teacher, batch: loss(
            student_lib.join(trained, settled), teacher, batch
        )
    )
    to_devices = lambda batch: jax.device_put(
        batch, sharding.named(mesh, ('batch', None))
    )

    def heldout_kl():
      return np.mean([
          float(score(state.trained, settled, teacher, to_devices(b)))
          for b in heldout
      ])

    def save():
      manifest = orbax_files.manifest(
          base.config, plan, int(state.step), config.name
      )
      saver.save(
          state, frozen,
          manifest | {'data': batches.get_state(), 'text': digest},
          orbax_files.tokenizer_tree(base.tokenizer),
      )

    # Everything below is the loop itself.
    first = int(state.step)
    writer = metrics.Writer(workdir, first)
    if not first:
      writer.write(0, {'heldout_kl_nats': heldout_kl()})
    tokens_a_step = train_s.batch_size * train_s.length
    clock, since, text = time.monotonic(), first, ''
    with metrics.Progress('train', train_s.steps, first) as progress:
      for n in range(first + 1, train_s.steps + 1):
        state, scalars = take_step(
            state, settled, teacher, to_devices(next(batches))
        )
        row = {}
        if n % train_s.log_every == 0 or n == train_s.steps:
          row = {k: float(v) for k, v in scalars.items()}
          _check_finite(n, row)
          now = time.monotonic()
          rate = (n - since) * tokens_a_step / (now - clock)
          row |= {
              'learning_rate': float(schedule(n - 1)),
              'tokens': n * tokens_a_step,
              'tokens_per_second': rate,
          }
          text = f'kl {row["kl_nats"]:.4f} nats, {rate:.0f} tokens/s'
        if n % train_s.evaluate_every == 0 or n == train_s.steps:
          row['heldout_kl_nats'] = heldout_kl()
        if row:
          writer.write(n, row)
        last = n == train_s.steps or stop.asked
        if n % train_s.checkpoint_every == 0 or last:
          save()
        # Evaluation and saving are not the step's time.
        if 'tokens_per_second' in row:
          clock, since = time.monotonic(), n
        progress.advance(text=text)
        if stop.asked and n < train_s.steps:
          writer.close()
          raise errors.Stopped(
              f'Stopped after step {n}; the same command goes on.'
          )
    writer.close()
  return train_s.steps


def load_text(config: ml_collections.ConfigDict):
  """Reads (training, held-out, evaluation) documents that share no text."""
  training, evaluation = sources.load_pair(
      config.data.train, config.evaluation.text
  )
  training, heldout = sources.split(
      training, config.data.heldout_fraction, config.seed
  )
  return training, heldout, evaluation


def _text(config, train_s, base, workdir):
  """Returns (batches, held-out and calibration batches, digest of the text)."""
  if base.tokenizer is None:
    raise errors.UserError(
        f'{base.source} has no tokenizer that can be read: put its '
        'tokenizer.model beside it.'
    )
  training, heldout, _ = load_text(config)
  cache = workdir / 'tokens'
  make = lambda documents, seed: pipeline.make_dataset(
      documents, base.tokenizer, train_s.batch_size, train_s.length, seed,
      cache_dir=cache,
  )
  count = -(-config.quant.calibration_tokens
            // (train_s.batch_size * train_s.length))
  take = lambda batches, n: [next(batches) for _ in range(n)]
  return (
      make(training, config.seed),
      take(make(heldout, config.seed), train_s.heldout_batches),
      # Another order than training's, so that the first batches differ.
      lambda: take(make(training, config.seed + 1), count),
      pipeline.digest(training, base.tokenizer),
  )


def _start(quant, compute, base, params, plan, calibrating):
  """Makes the student of step 0."""
  grams = None
  if quant.start != 'reference':
    batches = [b['tokens'] for b in calibrating()]
    model = settings.make_model(base.config, compute, transformer.identity)
    total = sum(b.size for b in batches)
    with metrics.Progress('calibrate', total) as progress:
      grams = calibration.gather_grams(
          model, params, batches, on_batch=progress.advance
      )
  with metrics.Progress(f'start: {quant.start}', len(plan)) as progress:
    return student_lib.init_student(
        base.config, params, plan, quant.start, grams,
        on_weight=lambda path: progress.advance(text=path),
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
  """Puts the optimizer's moments where their parameters are."""
  def place(path, leaf):
    for key in path:
      if getattr(key, 'key', None) in trained:
        return jax.device_put(leaf, trained[key.key].sharding)
    return jax.device_put(leaf, sharding.replicated(mesh))
  return jax.tree_util.tree_map_with_path(place, state)


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
