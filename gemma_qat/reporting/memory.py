"""How much memory does a Gemma 3 need to run, before it is downloaded?

Counted, not measured: weights by `storage`, the cache by the rules by which
llama.cpp sizes its own. Tests hold the figures against files and caches that
exist.
"""

import dataclasses

from gemma_qat import errors
from gemma_qat.model import config as model_config
from gemma_qat.reporting import storage
from gemma_qat.reporting import vision_tower

SIZES = ('270m', '1b', '4b', '12b', '27b')
KV_TYPES = ('f16', 'bf16', 'f32', 'q8_0', 'q4_0')
CONTEXT = 8192  # The default, where the model has as many.
UBATCH = 512  # llama.cpp's default: tokens that go through the layers at once.

# llama.cpp rounds the number of cached tokens up to a multiple of this.
_CACHE_PADDING = 256
# What a driver keeps for its context and a desktop for its windows: assumed.
_DRIVER_BYTES = 500_000_000


@dataclasses.dataclass(frozen=True)
class Cache:
  """Bytes of a key/value cache, and the tokens that a layer of a kind keeps."""

  local_bytes: int
  global_bytes: int
  local_tokens: int
  global_tokens: int

  @property
  def total(self) -> int:
    return self.local_bytes + self.global_bytes


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Everything that a model takes on a device, in bytes.

  Attributes:
    config, layout, embedding: what is estimated, keys as in `storage`.
    weights, cache: their parts.
    vision: tower and projector; 0 if they are not loaded.
    reserve: for what is computed, and for the driver.
  """

  config: model_config.ModelConfig
  layout: str
  embedding: str
  weights: storage.Weights
  cache: Cache
  vision: int
  reserve: int

  @property
  def fixed(self) -> int:
    """All but the cache: what does not grow with the context."""
    return self.weights.tensors + self.vision + self.reserve

  @property
  def total(self) -> int:
    return self.fixed + self.cache.total


@dataclasses.dataclass(frozen=True)
class Use:
  """How a model is run.

  Attributes:
    context: tokens; None for 8,192 or as many as the model has.
    kv: one of KV_TYPES.
    ubatch: tokens a batch, as in `kv_cache`.
    vision: whether the vision tower is loaded where there is one.
    reserve: bytes; None for `reserve_bytes`.
  """

  context: int | None = None
  kv: str = 'f16'
  ubatch: int = UBATCH
  vision: bool = False
  reserve: int | None = None


def has_context(config: model_config.ModelConfig, use: Use) -> bool:
  """Whether a model has the context that it is to be run with."""
  return use.context is None or 0 < use.context <= config.context_length


def estimate(
    config: model_config.ModelConfig,
    layout: str = 'q4_0',
    embedding: str | None = None,
    use: Use = Use(),
) -> Estimate:
  """Adds up what a model takes.

  Raises:
    UserError: as `storage.weights` and `kv_cache`.
  """
  found = storage.layout(layout)
  context = use.context
  if context is None:
    context = min(CONTEXT, config.context_length)
  size_vision = (
      vision_tower.mmproj_bytes if found.header else vision_tower.folder_bytes
  )
  return Estimate(
      config=config,
      layout=layout,
      embedding=embedding or found.embeddings[0],
      weights=storage.weights(config, layout, embedding),
      cache=kv_cache(config, context, use.kv, use.ubatch),
      vision=size_vision(config) if use.vision else 0,
      reserve=(
          reserve_bytes(config, use.ubatch)
          if use.reserve is None else use.reserve
      ),
  )


def kv_cache(
    config: model_config.ModelConfig,
    context: int,
    kv: str = 'f16',
    ubatch: int = UBATCH,
) -> Cache:
  """Counts the keys and values of one sequence as llama.cpp allocates them.

  A global layer keeps the context; a local one min(context, window + ubatch),
  since a batch is written before its oldest tokens are dropped; both rounded
  up to a multiple of 256 (`llama_kv_cache_iswa`, measured with ctypes).

  Args:
    config: the sizes.
    context: tokens.
    kv: one of KV_TYPES.
    ubatch: tokens a batch; 0 counts min(context, window) without rounding,
      the least that any program needs.

  Raises:
    UserError: unknown type, or a context that the model does not have.
  """
  if kv not in KV_TYPES:
    raise errors.UserError(
        f'Unknown type {kv!r} of the KV cache: choose one of '
        f'{", ".join(KV_TYPES)}.'
    )
  if not 0 < context <= config.context_length:
    raise errors.UserError(
        f'{config.variant} has a context of {config.context_length:,} tokens, '
        f'not {context:,}: give 1 to {config.context_length}.'
    )
  if ubatch < 0:
    raise errors.UserError(f'A batch of {ubatch} tokens cannot be: give 512.')
  padded = lambda n: -(-n // _CACHE_PADDING) * _CACHE_PADDING if ubatch else n
  global_tokens = padded(context)
  local_tokens = min(global_tokens, padded(config.sliding_window + ubatch))
  values = 2 * config.num_kv_heads * config.head_dim
  a_token = values // storage.TYPES[kv].block * storage.TYPES[kv].block_bytes
  num_global = sum(config.is_global(i) for i in range(config.num_layers))
  return Cache(
      local_bytes=(config.num_layers - num_global) * local_tokens * a_token,
      global_bytes=num_global * global_tokens * a_token,
      local_tokens=local_tokens,
      global_tokens=global_tokens,
  )


def reserve_bytes(
    config: model_config.ModelConfig, ubatch: int = UBATCH
) -> int:
  """Bytes that llama.cpp computes in, and the driver's.

  The float32 logits of a batch are most of its compute buffer: 512 MiB of the
  527 MiB that it reported for the 270M at 8,192 tokens. With flash attention;
  without, N x ubatch x context x 4 bytes can be more.
  """
  return 4 * (ubatch or UBATCH) * config.vocab_size + _DRIVER_BYTES


def longest_context(found: Estimate, budget: int, use: Use = Use()) -> int:
  """The most tokens with which a model fits into `budget` bytes; 0 if none.

  Args:
    found: the estimate of the model at any context.
    budget: the device's memory.
    use: how it is run; its context does not matter.
  """
  step = _CACHE_PADDING
  fits = lambda n: found.fixed + kv_cache(
      found.config, n * step, use.kv, use.ubatch
  ).total <= budget
  low, high = 0, found.config.context_length // step
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if fits(middle) else (low, middle - 1)
  return low * step
