"""How faithful is a model that runs in JAX?

The same protocol as llama.cpp's, for models that are no file yet: a model is a
function to hidden states and an output head. The vocabulary of 262,144 is never
held for a whole chunk: a few positions at a time go through the head.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.evaluation import protocol

# Positions through the head at once: 64 x 262,144 float32 logits are 67 MB, and
# the base's and the temporaries come on top.
_POSITIONS = 64

# Tokens [1, L] -> hidden states [1, L, D], already compiled by the caller.
HiddenFn = Callable[[jax.Array], jax.Array]


def evaluate(
    models: Mapping[str, tuple[HiddenFn, jax.Array]],
    chunks: np.ndarray,
    against: str | None = None,
    on_chunk: protocol.OnChunk | None = None,
) -> dict[str, protocol.Fidelity]:
  """Measures JAX models on one text, side by side.

  Args:
    models: name -> (hidden_fn, head [V, D]). The logits are hidden states times
      head, multiplied in the wider type of the two and summed in float32.
    chunks: int32 [chunks, L] from `protocol.chunk_tokens`.
    against: the name of the base for KL and top-1.
    on_chunk: hears of the progress.

  Raises:
    UserError: a base that is not among the models, or logits that are not
      finite.
  """
  names = list(protocol.in_order(list(models), against))
  positions = protocol.scored_positions(chunks.shape[1])

  def score_chunk(chunk):
    tokens = jnp.asarray(chunk)[None]
    states = {}
    for name in names:
      hidden_fn, head = models[name]
      states[name] = (hidden_fn(tokens)[0, positions], head)
    base = None if against is None else states[against]
    targets = chunk[positions + 1]
    return {
        name: _score(states[name], targets, None if name == against else base)
        for name in names
    }

  results = protocol.accumulate(chunks, score_chunk, on_chunk)
  return {name: results[name] for name in models}


def _score(model, targets, base):
  hidden, head = model
  parts = []
  for start in range(0, len(targets), _POSITIONS):
    rows = slice(start, start + _POSITIONS)
    # The last piece is filled up, so that one compilation serves all.
    fill = _POSITIONS - len(targets[rows])
    picked = jnp.asarray(np.pad(targets[rows], (0, fill)))
    args = (_filled(hidden[rows], fill), head, picked)
    if base is None:
      arrays = (_nll(*args),)
    else:
      arrays = _nll_and_kl(*args, _filled(base[0][rows], fill), base[1])
    kept = len(targets[rows])
    parts.append(protocol.TokenScores(*(np.asarray(a)[:kept] for a in arrays)))
  return protocol.concatenate(parts)


def _filled(rows, fill):
  return jnp.pad(rows, ((0, fill), (0, 0)))


@jax.jit
def _nll(hidden, head, targets):
  return _picked(_log_probs(hidden, head), targets)


@jax.jit
def _nll_and_kl(hidden, head, targets, base_hidden, base_head):
  log_probs = _log_probs(hidden, head)
  base = _log_probs(base_hidden, base_head)
  kl = jnp.sum(jnp.exp(base) * (base - log_probs), axis=-1)
  same_top = log_probs.argmax(axis=-1) == base.argmax(axis=-1)
  return _picked(log_probs, targets), kl, same_top


def _log_probs(hidden, head):
  # Accelerators round float32 factors to bfloat16 (TPU) or TF32 (GPU) unless
  # told otherwise, and that would be measured as divergence.
  logits = jnp.einsum(
      'pd,vd->pv',
      hidden,
      head,
      preferred_element_type=jnp.float32,
      precision=jax.lax.Precision.HIGHEST,
  )
  return jax.nn.log_softmax(logits, axis=-1)


def _picked(log_probs, targets):
  return -jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]
