"""How does a model write many texts at once?

All sequences of a batch stand at the same position, so one slice of the cache
is written at a time. Prompts of different lengths need no padding for that:
tokens that are given stand in for those that would be drawn, in the prompt as
in what is set between two turns. The cache holds every position for every
layer, although local layers read no more than their window.
"""

import dataclasses
import math
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat import sharding
from gemma_qat.model import config as model_config
from gemma_qat.model import drawing
from gemma_qat.model import transformer

# Positions between two looks at whether to stop.
_PIECE = 16


@dataclasses.dataclass(frozen=True)
class Rules:
  """When texts begin, turn and end, and how their tokens are drawn.

  Attributes:
    length: most tokens of a sequence, those given among them.
    stop_ids: tokens that end a sequence.
    turn_id: the token of `stop_ids` that, for the first time, is followed by
      `bridge` instead of the end; None if there is none.
    bridge: these tokens.
    forbidden: tokens that are never drawn.
    vocabulary: so many entries of the embedding mean a token; the others pad
      it and are never drawn.
    temperature, top_k, top_p: see `drawing.draw`.
  """

  length: int
  stop_ids: tuple[int, ...]
  forbidden: tuple[int, ...]
  vocabulary: int
  turn_id: int | None = None
  bridge: tuple[int, ...] = ()
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0


def make_sampler(
    model: transformer.Transformer, rules: Rules, mesh: jax.sharding.Mesh
) -> Callable[..., list[np.ndarray]]:
  """Returns sample(params, prompts, keys, between) -> tokens of each sequence.

  Args:
    model: the network, with whatever intercept its params need.
    rules: of the texts.
    mesh: its `data` and `fsdp` axes divide the batch.

  prompts are token ids with BOS, one list a sequence, each of 1 to length - 1;
  keys are as many, of `jax.random`: what is drawn at a position depends on the
  sequence's own key alone. between() is called every few positions; what it
  raises ends the work. A sequence that was returned holds its prompt, and
  the token that ended it, unless it is cut at `length`.
  """
  start = jax.jit(lambda *args: _start(model, rules, mesh, *args))
  advance = jax.jit(
      lambda *args: _advance(model, rules, *args), donate_argnums=1
  )
  rows = sharding.named(mesh, ('batch',))
  whole = sharding.named(mesh, ('batch', None))

  def sample(
      params: Mapping[str, Any],
      prompts: Sequence[Sequence[int]],
      keys: jax.Array,
      between: Callable[[], None] = lambda: None,
  ) -> list[np.ndarray]:
    given = np.array([len(p) for p in prompts], np.int32)
    tokens = np.zeros((len(prompts), rules.length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
      row[: len(prompt)] = prompt
    # A power of two: few lengths to compile. The last given token is read by
    # the first step.
    shared = int(given.min()) - 1
    read = 1 << (shared.bit_length() - 1) if shared else 0
    state = start(
        params, jax.device_put(tokens[:, :read], whole),
        jax.device_put(tokens, whole), jax.device_put(given, rows),
        jax.device_put(keys, rows),
    )
    at = read + 1
    while at < rules.length and not bool(state.is_done.all()):
      between()
      at = min(at + _PIECE, rules.length)
      state = advance(params, state, at)
    tokens, ends = np.asarray(state.tokens), np.asarray(state.ends)
    return [row[:end] for row, end in zip(tokens, ends, strict=True)]

  return sample


def cache_bytes(
    config: model_config.ModelConfig, batch: int, length: int, dtype
) -> int:
  """Returns what the keys and values of a batch take, over all devices."""
  cache = jax.eval_shape(
      lambda: transformer.init_cache(config, batch, length, dtype)
  )
  return sum(
      math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache)
  )


class _State(NamedTuple):
  """Where a batch stands.

  Attributes:
    tokens: int [B, length], right up to `at` and where they are given.
    given: int [B], positions below it are not drawn.
    ends: int [B], tokens of each sequence so far.
    is_done: bool [B].
    has_turned: bool [B], whether `bridge` was set in.
    at: the position that is drawn next.
    keys: [B].
    cache: filled below `at` - 1.
  """

  tokens: jax.Array
  given: jax.Array
  ends: jax.Array
  is_done: jax.Array
  has_turned: jax.Array
  at: jax.Array
  keys: jax.Array
  cache: Any


def _start(model, rules, mesh, params, first, tokens, given, keys):
  """Reads the tokens `first` [B, n] that stand at the head of all sequences."""
  batch, read = first.shape

  def place(x):
    axes = (None,) * (x.ndim - 4) + ('batch', None, None, None)
    return jax.lax.with_sharding_constraint(x, sharding.named(mesh, axes))

  cache = jax.tree.map(place, transformer.init_cache(
      model.config, batch, rules.length, model.dtype
  ))
  if read:
    positions = jnp.broadcast_to(jnp.arange(read), first.shape)
    _, cache = model.apply({'params': params}, first, positions, cache)
  no = jnp.zeros_like(given, bool)
  return _State(
      tokens, given, given, no, no, jnp.int32(read + 1), keys, cache
  )


def _advance(model, rules, params, state, until):
  """Goes on to the position `until`, or until all sequences have ended."""
  head = model.intercept('embedding', params['embedding'])
  allowed = np.arange(model.config.vocab_size) < rules.vocabulary
  allowed[list(rules.forbidden)] = False

  def step(state):
    last = state.at - 1
    tokens = jax.lax.dynamic_slice_in_dim(state.tokens, last, 1, axis=1)
    hidden, cache = model.apply(
        {'params': params}, tokens, jnp.full_like(tokens, last), state.cache
    )
    logits = transformer.unembed(hidden[:, -1], head, model.dtype)
    logits = jnp.where(allowed[None], logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.at)
    drawn = drawing.draw(
        logits, keys, rules.temperature, rules.top_k, rules.top_p
    )
    return _write(rules, state, drawn)._replace(cache=cache)

  return jax.lax.while_loop(
      lambda state: (state.at < until) & ~jnp.all(state.is_done), step, state
  )


def _write(rules, state, drawn):
  """Sets the drawn tokens [B] in where none are given, and sees who ends."""
  at = state.at
  here = jax.lax.dynamic_slice_in_dim(state.tokens, at, 1, axis=1)[:, 0]
  is_drawn = (at >= state.given) & ~state.is_done
  here = jnp.where(is_drawn, drawn, here)
  tokens = jax.lax.dynamic_update_slice_in_dim(
      state.tokens, here[:, None], at, axis=1
  )
  is_end = is_drawn & jnp.isin(drawn, np.array(rules.stop_ids, np.int32))
  ends = jnp.where(state.is_done, state.ends, jnp.maximum(state.ends, at + 1))
  given, has_turned = state.given, state.has_turned
  if rules.turn_id is not None:
    turns = is_end & (drawn == rules.turn_id) & ~has_turned
    bridge = np.array(rules.bridge, np.int32)
    # What would stand behind the end of the sequence is dropped.
    places = at + 1 + np.arange(len(bridge))
    bridged = tokens.at[:, places].set(bridge[None], mode='drop')
    tokens = jnp.where(turns[:, None], bridged, tokens)
    given = jnp.where(turns, at + 1 + len(bridge), given)
    has_turned |= turns
    is_end &= ~turns
  return state._replace(
      tokens=tokens, given=given, ends=ends, is_done=state.is_done | is_end,
      has_turned=has_turned, at=at + 1,
  )
