"""How faithful are GGUF files when llama.cpp runs them?"""

from collections.abc import Mapping, Sequence
import contextlib
import os

import numpy as np

from gemma_qat import errors
from gemma_qat.evaluation import llama_cpp
from gemma_qat.evaluation import protocol


def continue_all(
    paths: Mapping[str, str | os.PathLike],
    prompts: Sequence[np.ndarray],
    max_tokens: int,
) -> list[dict[str, str]]:
  """Lets every model continue every prompt, taking the likeliest token.

  Args:
    paths: name -> GGUF file; one is loaded at a time.
    prompts: integers [n] each, with BOS.
    max_tokens: of a continuation.

  Returns:
    For each prompt {name: its continuation}.
  """
  said = [{} for _ in prompts]
  context = max(map(len, prompts), default=0) + max_tokens
  for name, path in paths.items():
    with llama_cpp.LlamaCpp(path, context) as model:
      for texts, prompt in zip(said, prompts):
        texts[name] = model.text(model.generate(prompt, max_tokens))
  return said


def evaluate(
    paths: Mapping[str, str | os.PathLike],
    tokens: np.ndarray,
    context: int = 512,
    max_chunks: int | None = None,
    against: str | None = None,
    on_chunk: protocol.OnChunk | None = None,
    threads: int | None = None,
) -> dict[str, protocol.Fidelity]:
  """Measures GGUF files on one text, side by side.

  All models are loaded at once and see chunk after chunk together, so the
  base's probabilities never touch the disk.

  Args:
    paths: name -> GGUF file.
    tokens: integers [T], tokenized once with BOS, for example by
      `llama_cpp.LlamaCpp.tokenize` of one of the files.
    context: tokens of a chunk.
    max_chunks: evaluate only the first ones.
    against: the name of the base for KL and top-1.
    on_chunk: hears of the progress.
    threads: as in `llama_cpp.LlamaCpp`.

  Raises:
    UserError: a file that llama.cpp refuses, vocabularies of different size, a
      text that is too short, or a base that is not among the paths.
  """
  names = list(protocol.in_order(list(paths), against))
  with contextlib.ExitStack() as stack:
    models = {
        name: stack.enter_context(
            llama_cpp.LlamaCpp(paths[name], context, threads)
        )
        for name in names
    }
    _check_same_vocabulary(models)
    bos_id = models[names[0]].bos_id
    chunks = protocol.chunk_tokens(tokens, context, bos_id, max_chunks)
    positions = protocol.scored_positions(context)

    def score_chunk(chunk):
      targets, base, scores = chunk[positions + 1], None, {}
      for name in names:
        # All tokens of the chunk go in, as in llama-perplexity, though the last
        # row is dropped: ggml takes rows by four, and those left over from
        # 511 come out of another kernel (logits up to 0.8 apart on a Q4_K_M).
        logits = models[name].logits_view(chunk, int(positions[0]))[:-1]
        scores[name] = protocol.token_scores(logits, targets, base)
        if name == against:
          # In place: llama.cpp leaves its buffer alone until the next chunk.
          base = protocol.log_softmax(logits, out=logits)
      return scores

    results = protocol.accumulate(chunks, score_chunk, on_chunk)
  return {name: results[name] for name in paths}


def _check_same_vocabulary(models):
  sizes = {name: model.vocab_size for name, model in models.items()}
  if len(set(sizes.values())) > 1:
    listed = ', '.join(f'{name} {size}' for name, size in sizes.items())
    raise errors.UserError(
        f'The files have vocabularies of different size ({listed}): compare '
        'files of one model.'
    )
