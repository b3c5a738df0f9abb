"""What is scored, and what do the scores add up to?

The protocol is that of llama.cpp's llama-perplexity (tools/perplexity), so that
every engine of this package and the tool itself print comparable numbers: the
text is cut into chunks that do not see each other, and only the second half of
each chunk is scored, where every position has context//2 tokens to look at.

Axis letters: T tokens of the text, L tokens of a chunk, P scored positions,
V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import math

import numpy as np

from gemma_qat import errors

# Rows of logits in work at once: 8 x 262,144 float32 are 8 MB a temporary.
_ROWS = 8


@dataclasses.dataclass(frozen=True)
class TokenScores:
  """What one model scored at P positions.

  Invariant: all fields that are not None have the same length. `kl_nats` and
  `same_top` are None when there was no base to compare with.
  """

  nll_nats: np.ndarray  # [P] -log p(next token)
  kl_nats: np.ndarray | None = None  # [P] KL(base || model)
  same_top: np.ndarray | None = None  # [P] bool, the argmax is the base's


@dataclasses.dataclass(frozen=True)
class Fidelity:
  """How well one model predicts a text, and how close it is to its base.

  `top1` is a fraction (0..1), not percent. The fields that need a base are None
  when there was none: also for the base itself.
  """

  ppl: float
  ppl_stderr: float
  tokens: int  # scored ones
  chunks: int
  kld: float | None = None  # mean KL(base || model), nats a token
  kld_stderr: float | None = None
  kld_q99: float | None = None  # the KL that 99 % of the tokens stay below
  top1: float | None = None

  def as_dict(self) -> dict[str, float | int | None]:
    return dataclasses.asdict(self)


# Called after each chunk with (chunks done, chunks in all, fidelity so far).
OnChunk = Callable[[int, int, dict[str, Fidelity]], None]


def chunk_tokens(
    tokens: np.ndarray, context: int, bos_id: int, max_chunks: int | None = None
) -> np.ndarray:
  """Cuts a tokenized text into chunks that each begin with BOS.

  The tokens at the end that fill no chunk are dropped, as in llama-perplexity
  (which wants two chunks at least; one is enough here).

  Args:
    tokens: integers [T], the text tokenized once, *with* the BOS in front: the
      caller adds it. The first token of every chunk is overwritten by BOS.
    context: tokens of a chunk, 4 or more.
    bos_id: the token that opens each chunk.
    max_chunks: keep only the first ones.

  Returns:
    int32 [chunks, context].

  Raises:
    UserError: the text does not fill one chunk, or a setting makes no sense.
  """
  if context < 4:
    raise errors.UserError(
        f'A context of {context} tokens scores nothing: use 4 or more.'
    )
  if max_chunks is not None and max_chunks < 1:
    raise errors.UserError(
        f'{max_chunks} chunks cannot be evaluated: ask for 1 or more.'
    )
  tokens = np.asarray(tokens)
  num_chunks = len(tokens) // context
  if not num_chunks:
    raise errors.UserError(
        f'The text has {len(tokens)} tokens, a chunk needs {context}: use a '
        'longer text or a smaller context.'
    )
  if max_chunks is not None:
    num_chunks = min(num_chunks, max_chunks)
  chunks = tokens[: num_chunks * context].reshape(num_chunks, context)
  chunks = chunks.astype(np.int32)
  chunks[:, 0] = bos_id
  return chunks


def scored_positions(context: int) -> np.ndarray:
  """Returns the positions [P] whose next token is scored.

  These are context//2 .. context-2: position p predicts token p + 1, so the
  targets of a chunk are `chunk[scored_positions(context) + 1]`.
  """
  return np.arange(context // 2, context - 1)


def log_softmax(
    logits: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
  """Returns float32 log-probabilities [P, V] of float32 logits [P, V].

  The sum over the vocabulary runs in float64: a float32 sum of 262,144 terms
  shifts every log-probability of the row, and with it the row's KL. `out` may
  be `logits` itself.
  """
  if out is None:
    out = np.empty_like(logits)
  for start in range(0, len(logits), _ROWS):
    rows = slice(start, start + _ROWS)
    shifted = logits[rows] - logits[rows].max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    np.subtract(shifted, np.log(total).astype(np.float32), out=out[rows])
  return out


def token_scores(
    logits: np.ndarray,
    targets: np.ndarray,
    base_log_probs: np.ndarray | None = None,
) -> TokenScores:
  """Scores the logits of one model against the next tokens and a base.

  A few rows at a time, so that nothing of size [P, V] is added to the inputs.
  The sums run over the whole vocabulary in full precision; llama-perplexity
  rounds the base to 16 bits and skips probabilities below exp(-16), which gave
  0.004914 instead of 0.004900 for a Q4_K_M against F16.

  Args:
    logits: float32 [P, V].
    targets: integers [P], the token that came next.
    base_log_probs: float32 [P, V] from `log_softmax` of the base's logits.
  """
  num = len(targets)
  nll = np.empty(num, np.float64)
  kl = same = None
  if base_log_probs is not None:
    kl, same = np.empty(num, np.float64), np.empty(num, np.bool_)
  for start in range(0, num, _ROWS):
    rows = slice(start, min(start + _ROWS, num))
    log_probs = log_softmax(logits[rows])
    picked = targets[rows, None]
    nll[rows] = -np.take_along_axis(log_probs, picked, axis=-1)[:, 0]
    if base_log_probs is not None:
      base = base_log_probs[rows]
      terms = np.exp(base) * (base - log_probs)
      kl[rows] = terms.sum(axis=-1, dtype=np.float64)
      same[rows] = log_probs.argmax(axis=-1) == base.argmax(axis=-1)
  return TokenScores(nll, kl, same)


def concatenate(parts: Sequence[TokenScores]) -> TokenScores:
  """Joins the scores of several chunks along the positions."""
  fields = [f.name for f in dataclasses.fields(TokenScores)]
  joined = {}
  for field in fields:
    arrays = [getattr(part, field) for part in parts]
    joined[field] = None if arrays[0] is None else np.concatenate(arrays)
  return TokenScores(**joined)


def summarize(scores: TokenScores, chunks: int) -> Fidelity:
  """Reduces token scores to means with their standard errors.

  llama.cpp's formulas: the standard error of a mean is the square root of the
  biased variance over n - 1, and that of the perplexity is the perplexity times
  the standard error of the mean NLL. Neighbouring tokens count as independent.
  """
  nll, nll_stderr = _mean_and_stderr(scores.nll_nats)
  ppl = float(np.exp(nll))
  fidelity = Fidelity(
      ppl=ppl,
      ppl_stderr=ppl * nll_stderr,
      tokens=len(scores.nll_nats),
      chunks=chunks,
  )
  if scores.kl_nats is None:
    return fidelity
  kld, kld_stderr = _mean_and_stderr(scores.kl_nats)
  return dataclasses.replace(
      fidelity,
      kld=kld,
      kld_stderr=kld_stderr,
      kld_q99=float(np.quantile(scores.kl_nats, 0.99)),
      top1=float(scores.same_top.mean()),
  )


def accumulate(
    chunks: np.ndarray,
    score_chunk: Callable[[np.ndarray], Mapping[str, TokenScores]],
    on_chunk: OnChunk | None = None,
) -> dict[str, Fidelity]:
  """Scores chunk after chunk, all models on each, and sums up.

  Args:
    chunks: int32 [chunks, L] from `chunk_tokens`.
    score_chunk: scores one chunk [L] with every model, by name.
    on_chunk: hears of the progress after each chunk.

  Raises:
    UserError: a model's logits are not finite.
  """
  parts = {}
  for done, chunk in enumerate(chunks, start=1):
    for name, scores in score_chunk(chunk).items():
      if not np.isfinite(scores.nll_nats).all():
        raise errors.UserError(
            f'{name}: the logits of chunk {done} are not finite: the weights '
            'are damaged.'
        )
      parts.setdefault(name, []).append(scores)
    if on_chunk is not None:
      on_chunk(done, len(chunks), _summaries(parts))
  return _summaries(parts)


def in_order(names: Sequence[str], against: str | None) -> Iterator[str]:
  """Yields the names, the base first: its scores are needed by the others.

  Raises:
    UserError: `against` is not one of the names.
  """
  if against is None:
    yield from names
    return
  if against not in names:
    raise errors.UserError(
        f'The base {against!r} is not among the models: choose one of '
        f'{", ".join(names)}.'
    )
  yield against
  yield from (name for name in names if name != against)


def _summaries(parts):
  return {
      name: summarize(concatenate(scores), len(scores))
      for name, scores in parts.items()
  }


def _mean_and_stderr(values):
  if len(values) < 2:
    return float(values.mean()), 0.0
  return float(values.mean()), math.sqrt(values.var() / (len(values) - 1))
