"""What did a run reach, and how was that measured?

`make_report` has the numbers, `markdown.render_markdown` says them in words,
`write` leaves both and the plots in the workdir.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

from gemma_qat.checkpoints import atomic
from gemma_qat.evaluation import protocol
from gemma_qat.reporting import markdown
from gemma_qat.reporting import plots

JSON = 'report.json'
MARKDOWN = 'report.md'
PLOTS = {'loss': 'loss.png', 'fidelity': 'fidelity.png'}
MODELS = ('base', 'ptq', 'qat')

Fidelities = Mapping[str, protocol.Fidelity]


@dataclasses.dataclass(frozen=True)
class Training:
  """What was trained, and for how long.

  Attributes:
    steps: optimizer steps.
    tokens: tokens of all steps.
    tokens_per_second: of the training steps alone.
    start: how the first codes were found: 'reference', 'search' or 'gptq'.
    trained: group of leaves -> its peak learning rate.
    embedding_format: of the embedding, in the PTQ file and the trained one.
    config: name of the config.
    git: revision of the program.
  """

  steps: int
  tokens: int
  tokens_per_second: float
  start: str
  trained: Mapping[str, float]
  embedding_format: str
  config: str
  git: str


@dataclasses.dataclass(frozen=True)
class Measurement:
  """What one engine measured of 'base', 'ptq' and 'qat' on one text.

  Attributes:
    engine: for example 'llama.cpp 1.2.3 in process'.
    context: tokens of a chunk.
    text: name of the text.
    base: what the base is, when "the checkpoint" says too little: 'the Q4_K_M
      file dequantized to float16'.
    fidelities: the three models, all on the same chunks.
  """

  engine: str
  context: int
  text: str
  base: str
  fidelities: Fidelities


def make_report(
    *,
    model: str,
    device: str,
    seconds: Mapping[str, float],
    training: Training,
    measured: Measurement,
    file_bytes: Mapping[str, int],
    jax: Fidelities | None = None,
    on_jax_chunks: Fidelities | None = None,
    samples: Sequence[Mapping[str, str]] = (),
    activations: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
  """Assembles the numbers of a run.

  Args:
    model: the checkpoint that was trained.
    device: what trained it.
    seconds: phase -> seconds; 'total' among them.
    training: what was trained.
    measured: by llama.cpp.
    file_bytes: of 'base_bf16', 'ptq' and 'qat'.
    jax: the same three models by the JAX engine, at the same context; perhaps
      on fewer chunks of the same text.
    on_jax_chunks: by llama.cpp again, on the very chunks that JAX read.
    samples: 'prompt' and what each model said to it, by its name.
    activations: the largest of each model, `model.ranges.summary`.

  Returns:
    What `report.json` holds: only dicts, lists, strings, numbers and None.
    Shares and `top1` are fractions, KL is in nats a token. A recovered share is
    None where PTQ lost nothing; the 'notes' of the same engine then say so.

  Raises:
    ValueError: the models of an engine were measured on different chunks.
  """
  report = {
      'model': model,
      'device': device,
      'steps': training.steps,
      'tokens': training.tokens,
      'seconds': seconds['total'],
      'engine': measured.engine,
      'context': measured.context,
      'text': measured.text,
      'base': measured.base,
      **_figures(measured.fidelities),
      'bytes': {k: file_bytes[k] for k in ('base_bf16', 'ptq', 'qat')},
      'jax': None if jax is None else _figures(jax),
      'llama_cpp_on_jax_chunks': (
          None if on_jax_chunks is None else _figures(on_jax_chunks)
      ),
      'samples': [dict(s) for s in samples],
      'activations': {n: dict(a) for n, a in (activations or {}).items()},
      'seconds_by_phase': {
          k: v for k, v in seconds.items() if k != 'total'
      },
  }
  return report | {
      k: v for k, v in dataclasses.asdict(training).items() if k not in report
  }


def write(
    workdir: str | os.PathLike,
    report: Mapping[str, Any],
    rows: Sequence[Mapping[str, float]],
) -> None:
  """Writes the plots, report.md and, last, report.json; each whole or not.

  Args:
    workdir: an existing folder.
    report: from `make_report`.
    rows: of `metrics.jsonl`.

  Raises:
    UserError: the folder cannot be written.
    ValueError: a number of the report is not finite.
  """
  workdir = pathlib.Path(workdir)
  # Before anything is written: JSON knows no NaN and no infinity.
  numbers = json.dumps(report, indent=2, allow_nan=False) + '\n'
  with atomic.whole_file(workdir / PLOTS['loss']) as path:
    plots.plot_loss(rows, path)
  with atomic.whole_file(workdir / PLOTS['fidelity']) as path:
    plots.plot_fidelity(report, path)
  with atomic.whole_file(workdir / MARKDOWN) as path:
    path.write_text(markdown.render_markdown(report, PLOTS), encoding='utf-8')
  with atomic.whole_file(workdir / JSON) as path:
    path.write_text(numbers, encoding='utf-8')


def _figures(fidelities):
  """Returns one engine's part of the report."""
  base, ptq, qat = (fidelities[name] for name in MODELS)
  if len({(f.chunks, f.tokens) for f in (base, ptq, qat)}) > 1:
    raise ValueError('base, ptq and qat were measured on different chunks.')
  notes = []
  recovered_ppl = recovered_kld = None
  if ptq.ppl > base.ppl:
    recovered_ppl = 1 - (qat.ppl - base.ppl) / (ptq.ppl - base.ppl)
    if recovered_ppl > 1:
      notes.append(
          'More than all of the perplexity was won back: the trained model '
          'predicts this text better than its base. How close it is to the '
          'base is what the KL divergence says.'
      )
  else:
    notes.append(
        f'recovered_ppl is null: PTQ lost no perplexity ({ptq.ppl:.4f}, '
        f'base {base.ppl:.4f}), so there was nothing to win back.'
    )
  if ptq.kld is not None and ptq.kld > 0:
    recovered_kld = 1 - qat.kld / ptq.kld
  else:
    notes.append(
        f'recovered_kld is null: the KL divergence of PTQ is {ptq.kld}, so '
        'there was nothing to win back.'
    )
  pick = lambda field, names: {
      name: getattr(fidelities[name], field) for name in names
  }
  return {
      'chunks': base.chunks,
      'tokens_scored': base.tokens,
      'ppl': pick('ppl', MODELS),
      'ppl_stderr': pick('ppl_stderr', MODELS),
      'kld': pick('kld', MODELS[1:]),
      'kld_stderr': pick('kld_stderr', MODELS[1:]),
      'kld_q99': pick('kld_q99', MODELS[1:]),
      'top1': pick('top1', MODELS[1:]),
      'recovered_ppl': recovered_ppl,
      'recovered_kld': recovered_kld,
      'notes': notes,
  }
