"""Measure models: perplexity, KL divergence, top-1 agreement, as llama.cpp."""

import argparse
import contextlib
import json
import os
import pathlib
import tempfile
from typing import Mapping, Sequence

import jax
import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import export
from gemma_qat.checkpoints import prepare
from gemma_qat.commands import networks
from gemma_qat.data import sources
from gemma_qat.evaluation import jax_engine
from gemma_qat.evaluation import llama_binding
from gemma_qat.evaluation import llama_cpp
from gemma_qat.evaluation import llama_engine
from gemma_qat.evaluation import llama_tool
from gemma_qat.evaluation import protocol
from gemma_qat.model import ranges
from gemma_qat.reporting import tables
from gemma_qat.training import metrics

ENGINES = ('llama.cpp', 'jax')


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser('gemma-qat evaluate', description=__doc__)
  parser.add_argument('models', nargs='+', metavar='MODEL')
  parser.add_argument('--text', required=True,
                      help='a UTF-8 file, or a source such as topics')
  parser.add_argument('--against', metavar='MODEL',
                      help='the base of KL divergence and top-1 agreement')
  parser.add_argument('--context', type=int, default=512,
                      help='tokens a chunk (default: 512)')
  parser.add_argument('--chunks', type=int, help='all of the text by default')
  parser.add_argument('--engine', choices=ENGINES, default='llama.cpp')
  parser.add_argument('--json', metavar='FILE', type=pathlib.Path)
  a = parser.parse_args(argv)
  models = list(dict.fromkeys([*([a.against] if a.against else []), *a.models]))
  engine, found = evaluate(
      {m: m for m in models}, read_text(a.text), a.context, a.chunks,
      a.against, a.engine,
  )
  size = lambda m: os.path.getsize(m) if os.path.isfile(m) else None
  print(tables.render_table((m, size(m), found[m]) for m in models))
  first = next(iter(found.values()))
  print(f'{first.chunks} chunks of {a.context} tokens of {a.text}, by {engine}')
  if a.json:
    a.json.write_text(json.dumps({
        'engine': engine, 'text': a.text, 'context': a.context,
        'models': {m: f.as_dict() for m, f in found.items()},
    }, indent=2) + '\n', encoding='utf-8')
  return 0


def evaluate(
    models: Mapping[str, str | os.PathLike],
    text: str,
    context: int = 512,
    chunks: int | None = None,
    against: str | None = None,
    engine: str = 'llama.cpp',
    on_chunk: protocol.OnChunk | None = None,
    magnitudes: dict[str, dict[str, float]] | None = None,
) -> tuple[str, dict[str, protocol.Fidelity]]:
  """Measures models side by side on one text.

  Args:
    models: name -> what `detect.load` takes.
    text: the text itself.
    context: tokens a chunk.
    chunks: the most chunks; None for all.
    against: the name of the base.
    engine: 'llama.cpp' (llama-perplexity where it is installed, else the
      library in process) or 'jax'.
    on_chunk: hears of every chunk, beside the progress display.
    magnitudes: receives, of each model that JAX runs, the largest of what its
      layers compute; see `model.ranges`.

  Returns:
    (what measured, name -> Fidelity).

  Raises:
    UserError: a model cannot be loaded, or the text is too short.
  """
  with contextlib.ExitStack() as stack:
    shown = _Shown(stack, engine, on_chunk)
    if engine == 'jax':
      return 'JAX ' + jax.__version__, _by_jax(
          models, text, context, chunks, against, shown, magnitudes
      )
    files = {
        name: _as_gguf(stack, name, model) for name, model in models.items()
    }
    tool = llama_tool.find_tool()
    if tool is not None:
      file = pathlib.Path(_temporary(stack)) / 'text.txt'
      file.write_text(text, encoding='utf-8')
      return 'llama-perplexity', llama_tool.evaluate_with_tool(
          tool, files, file, context, chunks, against
      )
    with llama_cpp.LlamaCpp(next(iter(files.values())), context) as model:
      tokens = model.tokenize(text, add_bos=True)
    return (
        f'llama.cpp in process (xllamacpp {llama_binding.VERSION})',
        llama_engine.evaluate(files, tokens, context, chunks, against, shown),
    )


def read_text(text: str) -> str:
  """Reads a file, or joins the documents of a source."""
  path = pathlib.Path(text)
  if path.is_file():
    try:
      return path.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
      raise errors.UserError(
          f'--text={text} is not UTF-8 ({error.reason} at byte '
          f'{error.start}): convert it.'
      ) from error
  return join(sources.load(text))


def join(documents: Sequence[sources.Document]) -> str:
  """The text that an evaluation reads of some documents."""
  return '\n\n'.join(d.text for d in documents)


def _by_jax(models, text, context, chunks, against, on_chunk, magnitudes):
  magnitudes = {} if magnitudes is None else magnitudes
  loaded, tokens, bos = {}, None, None
  for name, model in models.items():
    checkpoint = detect.load(model)
    tokenizer = checkpoints.tokenizer(checkpoint)
    ids = tokenizer.encode(text, bos=True)
    if tokens is not None and not np.array_equal(ids, tokens):
      raise errors.UserError(
          f'{name} tokenizes the text differently from {next(iter(loaded))}: '
          'only models of one vocabulary can be compared.'
      )
    tokens, bos = ids, tokenizer.bos_id
    loaded[name] = _jax_model(checkpoint, magnitudes.setdefault(name, {}))
  return jax_engine.evaluate(
      loaded, protocol.chunk_tokens(tokens, context, bos, chunks), against,
      on_chunk,
  )


def _jax_model(checkpoint, magnitudes):
  network, params = networks.load(checkpoint)
  apply = jax.jit(
      lambda p, tokens: network.apply({'params': p}, tokens, mutable='range')
  )

  def hidden(tokens):
    states, seen = apply(params, tokens)
    ranges.widen(
        magnitudes, ranges.by_layer(checkpoint.config, seen['range'])
    )
    return states

  return hidden, params['embedding']


def _as_gguf(stack, name, model):
  """The model's own GGUF, or a temporary one with the same numbers."""
  checkpoint = detect.load(model)
  if checkpoint.layout == 'gguf':
    return checkpoint.source
  path = pathlib.Path(_temporary(stack)) / 'model.gguf'
  if prepare.is_quantized(checkpoint):
    export.export(checkpoint, path)
  else:
    export.save_float(checkpoint, path, 'bf16')
  return path


def _temporary(stack):
  return stack.enter_context(tempfile.TemporaryDirectory(prefix='gemma-qat-'))


class _Shown:
  """Shows how far an evaluation is, and passes the news on."""

  def __init__(self, stack, title, listener):
    self._stack, self._title, self._listener = stack, title, listener
    self._progress = None

  def __call__(self, done, total, fidelities):
    if self._progress is None:
      self._progress = self._stack.enter_context(
          metrics.Progress(f'evaluate, {self._title}', total)
      )
    text = ', '.join(f'{n} {f.ppl:.2f}' for n, f in fidelities.items())
    self._progress.advance(text='perplexity ' + text)
    if self._listener:
      self._listener(done, total, fidelities)
