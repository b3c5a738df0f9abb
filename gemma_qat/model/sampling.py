"""How does a model continue a text, one token after the other?"""

from typing import Any, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat import errors
from gemma_qat.model import transformer


def generate(
    model: transformer.Transformer,
    params: Mapping[str, Any],
    prompt: Sequence[int],
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
  """Yields new tokens, each computed with a key/value cache.

  Args:
    model: the network, with whatever intercept its params need.
    params: its tree.
    prompt: token ids [T], with BOS.
    max_tokens: most tokens to yield.
    stop_ids: tokens that end the text; not yielded.
    temperature: 0 takes the likeliest token; else logits are divided by it
      and sampled from, over the whole vocabulary.
    seed: of the sampling.

  Raises:
    UserError: an empty prompt, or more tokens than the model's context.
  """
  length = len(prompt) + max_tokens
  if not len(prompt) or length > model.config.context_length:
    raise errors.UserError(
        f'{len(prompt)} tokens of prompt and {max_tokens} new ones do not fit '
        f'1 .. {model.config.context_length}: change --prompt or --max_tokens.'
    )

  def advance(params, cache, tokens, start, key):
    positions = start + jnp.arange(tokens.shape[1])[None]
    hidden, cache = model.apply({'params': params}, tokens, positions, cache)
    head = model.intercept('embedding', params['embedding'])
    logits = transformer.unembed(hidden[:, -1], head, model.dtype)[0]
    if temperature:
      return cache, jax.random.categorical(key, logits / temperature)
    return cache, jnp.argmax(logits)

  advance = jax.jit(advance, donate_argnums=1)
  cache = transformer.init_cache(model.config, 1, length)
  tokens = np.asarray(prompt, np.int32)[None]
  key, start = jax.random.key(seed), 0
  for i in range(max_tokens):
    cache, token = advance(
        params, cache, tokens, start, jax.random.fold_in(key, i)
    )
    token = int(token)
    if token in stop_ids:
      return
    yield token
    start += tokens.shape[1]
    tokens = np.asarray([[token]], np.int32)
