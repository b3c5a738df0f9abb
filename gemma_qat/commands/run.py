"""Train, export, evaluate and report: from a checkpoint to a proven file."""

import argparse
import contextlib
import json
import os
import pathlib
import time

import ml_collections

from gemma_qat import hosts
from gemma_qat.checkpoints import atomic
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import export
from gemma_qat.checkpoints import regular_files
from gemma_qat.commands import config_flags
from gemma_qat.commands import evaluate
from gemma_qat.commands import job_flags
from gemma_qat.data import chat
from gemma_qat.evaluation import llama_engine
from gemma_qat.model import ranges
from gemma_qat.reporting import report as reporting
from gemma_qat.reporting import tables
from gemma_qat.training import loop
from gemma_qat.training import metrics
from gemma_qat.training import settings
from gemma_qat.training import stopping
from gemma_qat.training import text as text_lib
from gemma_qat.training import workdir as workdirs

BASE, PTQ, QAT = 'base-bf16.gguf', 'ptq-q4_0.gguf', 'model-q4_0.gguf'
TEXT, SECONDS = 'evaluation.txt', 'seconds.json'


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser('gemma-qat run', description=__doc__)
  parser.add_argument('--workdir', required=True, type=pathlib.Path,
                      help='receives everything; a stopped run goes on there')
  job_flags.add(parser)
  arguments, config = config_flags.parse(parser, argv)
  job_flags.apply(arguments)
  run_and_say(config, arguments.workdir, arguments.profile)
  return 0


def run_and_say(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, profile: int = 0
) -> None:
  """Does the main job as `run`; prints the result and where it lies."""
  found = run(config, workdir, profile)
  if found is None:
    return
  report, fidelities = found
  sizes = {n: report['bytes'].get(k) for n, k in
           (('base', 'base_bf16'), ('ptq', 'ptq'), ('qat', 'qat'))}
  print(tables.render_table((n, sizes[n], f) for n, f in fidelities.items()))
  share = lambda x: 'undefined' if x is None else f'{x:.1%}'
  print(
      f'Recovered of what PTQ lost: {share(report["recovered_ppl"])} of the '
      f'perplexity, {share(report["recovered_kld"])} of the KL divergence.\n'
      f'The file for llama.cpp: {workdir / QAT}\n'
      f'The report:             {workdir / reporting.MARKDOWN} '
      f'(numbers: {reporting.JSON})\n'
      f'Checkpoints, metrics:   {workdir / "checkpoints"}, '
      f'{workdir / metrics.FILE}, {workdir / "events"} (TensorBoard)'
  )


def run(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    profile: int = 0,
):
  """Does the main job; goes on where the workdir stands.

  Args:
    config: see `experiments/configs/base.py`.
    workdir: receives the files named in this module.
    profile: steps to trace, see `loop.train`.

  Returns:
    (report as in report.json, llama.cpp's fidelities by model); None in every
    process but the first, which exports and evaluates alone.

  Raises:
    UserError, Stopped: as `loop.train`.
  """
  workdir = pathlib.Path(workdir)
  with contextlib.ExitStack() as held:
    if hosts.is_first():
      # Before training: its result is not for two to export.
      held.enter_context(workdirs.hold(workdir, 'run'))
    clock = _Clock(workdir)
    with clock.phase('train'):
      step = loop.train(config, workdir, profile)
    is_first = hosts.is_first()
    hosts.leave()
    if not is_first:
      return None
    # What a kill left behind of files that were under way.
    atomic.remove_rests(workdir)
    with stopping.at_once('the same command goes on'):
      return _prove(config, workdir, step, clock)


def _prove(config, workdir, step, clock):
  """Exports, evaluates and reports what was trained; see `run`."""
  with clock.phase('export'):
    files, embedding = _export(config, workdir, step)
  text = evaluate.join(text_lib.evaluation(config))
  with atomic.whole_file(workdir / TEXT) as temporary:
    temporary.write_text(text, encoding='utf-8')
  e = config.evaluation
  # What llama.cpp says of the chunks that JAX reads, too.
  same = {}

  def on_chunk(done, total, fidelities):
    del total
    if done == e.jax_chunks:
      same.update(fidelities)

  with clock.phase('evaluate'):
    engine, fidelities = evaluate.evaluate(
        files, text, e.context, e.chunks, 'base', on_chunk=on_chunk
    )
    magnitudes = {}
    _, by_jax = evaluate.evaluate(
        files, text, e.context, e.jax_chunks, 'base', engine='jax',
        magnitudes=magnitudes,
    )
    samples = _samples(config, files)
  report = reporting.make_report(
      model=f'Gemma 3 {detect.load(config.model.checkpoint).config.variant}',
      device=workdirs.device_name(),
      seconds=clock.seconds(),
      training=_training(config, workdir, step, embedding),
      measured=reporting.Measurement(
          engine, e.context, e.text, _base_name(config), fidelities
      ),
      file_bytes={
          'base_bf16': files['base'].stat().st_size,
          'ptq': files['ptq'].stat().st_size,
          'qat': files['qat'].stat().st_size,
      },
      jax=by_jax,
      on_jax_chunks=same or None,
      samples=samples,
      activations={n: ranges.summary(m) for n, m in magnitudes.items()},
  )
  reporting.write(workdir, report, metrics.read(workdir))
  return report, fidelities


def _export(config, workdir, step):
  """Writes the three files; returns them and the embedding's format."""
  trained = detect.load(workdir / 'checkpoints' / str(step))
  given = detect.load(config.model.checkpoint)
  formats = {n: e.format for n, e in trained.weights.entries.items()}
  files = {n: workdir / f for n, f in
           (('base', BASE), ('ptq', PTQ), ('qat', QAT))}
  export.save_float(given, files['base'], 'bf16')
  # The same tensors in the same formats, by the reference rule.
  choices = {n: f for n, f in formats.items() if f}
  export.quantize(given, files['ptq'], choices)
  export.export(trained, files['qat'])
  return files, formats['embedding'] or 'f16'


def _samples(config, files):
  """What base, PTQ and QAT say to the config's prompts."""
  prompts, count = config.evaluation.prompts, config.evaluation.sample_tokens
  tokenizer = checkpoints.tokenizer(detect.load(config.model.checkpoint))
  # What was trained to speak in turns is asked in one.
  speaks = tokenizer.chat_template is not None
  ask = lambda text: chat.render(
      [{'role': 'user', 'content': text}], 'config.evaluation.prompts'
  ) + chat.MODEL_BEGINS
  tokens = [
      tokenizer.encode(ask(p) if speaks else p, bos=True, specials=speaks)
      for p in prompts
  ]
  said = llama_engine.continue_all(files, tokens, count) if count else []
  return [{'prompt': p, **texts} for p, texts in zip(prompts, said)]


def _training(config, workdir, step, embedding):
  rates = [
      (r['step'], r['tokens_per_second']) for r in metrics.read(workdir)
      if 'tokens_per_second' in r
  ]
  # The first row holds the compilation.
  steady = [rate for _, rate in rates[1:]] or [rate for _, rate in rates]
  s = settings.train(config)
  groups = {g for _, g in s.rules if g}
  rate = config.optimizer.learning_rate
  return reporting.Training(
      steps=step,
      tokens=step * s.batch_size * s.length,
      tokens_per_second=sum(steady) / max(len(steady), 1),
      start=config.quant.start,
      trained={g: rate * config.optimizer.multipliers[g] for g in groups},
      embedding_format=embedding,
      config=config.name,
      git=workdirs.git_revision(),
  )


def _base_name(config):
  source = detect.load(config.model.checkpoint)
  kinds = {}
  for entry in source.weights.entries.values():
    kinds[entry.type] = kinds.get(entry.type, 0) + 1
  if source.layout == 'gguf':
    return (
        f'{config.model.checkpoint}, a GGUF of {", ".join(sorted(kinds))} '
        'tensors, dequantized to bfloat16'
    )
  return f'{config.model.checkpoint} in bfloat16'


class _Clock:
  """The seconds of each phase; those of training over all its sessions."""

  def __init__(self, workdir):
    self._path = workdir / SECONDS
    self._seconds = {}
    if self._path.is_file():
      said = regular_files.read_json(self._path)
      self._seconds = {k: v for k, v in said.items() if isinstance(v, float)}

  @contextlib.contextmanager
  def phase(self, name):
    start = time.monotonic()
    try:
      yield
    finally:
      spent = time.monotonic() - start
      # Export and evaluation are done anew, training goes on.
      before = self._seconds.get(name, 0.0) if name == 'train' else 0.0
      self._seconds[name] = before + spent
      if hosts.is_first() and self._path.parent.is_dir():
        with atomic.whole_file(self._path) as temporary:
          pathlib.Path(temporary).write_text(
              json.dumps(self._seconds), encoding='utf-8'
          )

  def seconds(self):
    return {**self._seconds, 'total': sum(self._seconds.values())}
