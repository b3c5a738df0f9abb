"""How do tokens become hidden states, whatever stands in for the weights?

The network is a pure function of (variables, tokens). `intercept(path, leaf)`
is its argument: every weight passes through it inside its layer, so that what
the tree holds (float32 masters, codes and scales, anything) becomes the array
that the layer multiplies with, one layer at a time.
"""

import dataclasses
from typing import Any, Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from gemma_qat import errors
from gemma_qat.model import attention
from gemma_qat.model import config as model_config
from gemma_qat.model import layers
from gemma_qat.model import weights

Intercept = Callable[[str, Any], jax.Array]
Constrain = Callable[[jax.Array, tuple[str, ...]], jax.Array]


def identity(path: str, leaf: Any) -> jax.Array:
  """Hands every weight through as it is stored."""
  del path
  return leaf


def unconstrained(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Leaves it to the compiler where activations lie."""
  del axes
  return x


# What a rematerialised layer keeps for the backward pass.
REMAT_POLICIES: Mapping[str, Callable[..., bool] | None] = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'products': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'none': None,
}


class Transformer(nn.Module):
  """Gemma 3 text model up to its final norm.

  Attributes:
    config: the sizes.
    intercept: what every weight passes through; see the module docstring. Of
      the embedding only the rows of the batch's tokens do.
    constrain: constrain(x, logical axes) says where activations lie on a mesh;
      their axes are batch, length, width, heads, kv_heads, head_dim, mlp.
    dtype: of the operands of matrix products (accumulated in float32).
    residual_dtype: of the residual stream.
    remat: a name in REMAT_POLICIES.
    attention: see `attention.attend`.
    round_embedding_multiplier: round sqrt(D) to bfloat16, as the original
      implementation does; llama.cpp does not.
  """

  config: model_config.ModelConfig
  intercept: Intercept = identity
  constrain: Constrain = unconstrained
  dtype: Any = jnp.bfloat16
  residual_dtype: Any = jnp.float32
  remat: str = 'full'
  attention: str = 'xla'
  round_embedding_multiplier: bool = False

  @nn.compact
  def __call__(self, tokens, positions=None, cache=None):
    """Computes the hidden states after the final norm.

    Args:
      tokens: int [B, L].
      positions: int [B, L]; 0 .. L-1 when absent.
      cache: from `init_cache`, for generation; None for whole sequences.

    Returns:
      [B, L, D] in `residual_dtype`; with a cache also the cache, filled.
      Where the collection 'gram' is mutable, it receives the second moments
      [C, C] of matrices' inputs, summed over tokens: under the name of the
      first of those that share their inputs (`READERS`). The collection
      'range' receives the largest magnitudes of what each layer computes, see
      `ranges`.
    """
    c = self.config
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    settings = self.settings()
    outer = weights.outer_specs(c)
    x = _weight(self, settings, '', 'embedding', outer, rows=tokens)
    x = self.constrain(embed(self, x), _STREAM)
    new_cache = {}
    if c.num_groups:
      scan = nn.scan(
          _Layers,
          variable_axes={'params': 0, 'gram': 0, 'range': 0},
          split_rngs={'params': True},
          in_axes=(nn.broadcast, 0),
          out_axes=0,
          length=c.num_groups,
      )
      x, new_cache['groups'] = scan(settings, 'groups', c.pattern, name='groups')(
          x, positions, cache and cache['groups']
      )
    if c.num_tail_layers:
      tail = _Layers(settings, 'tail', c.num_tail_layers, name='tail')
      x, new_cache['tail'] = tail(x, positions, cache and cache.get('tail'))
    final = _weight(self, settings, '', 'final_norm', outer)
    x = layers.rms_norm(x, final, c.norm_epsilon)
    return x if cache is None else (x, new_cache)

  def settings(self) -> '_Settings':
    """What every layer needs to know."""
    return _Settings(
        self.config, self.intercept, self.constrain, self.dtype, self.remat,
        self.attention,
    )


# The matrices of a layer that read the same inputs, by the first of them.
READERS: Mapping[str, tuple[str, ...]] = {
    'attn_q': ('attn_q', 'attn_k', 'attn_v'),
    'attn_o': ('attn_o',),
    'mlp_gate': ('mlp_gate', 'mlp_up'),
    'mlp_down': ('mlp_down',),
}
_STREAM = ('batch', 'length', 'width')
_HEADS = ('batch', 'length', 'heads', 'head_dim')
_KV_HEADS = ('batch', 'length', 'kv_heads', 'head_dim')
_MLP = ('batch', 'length', 'mlp')


@dataclasses.dataclass(frozen=True)
class _Settings:
  """What every layer needs to know of the model around it."""

  config: model_config.ModelConfig
  intercept: Intercept
  constrain: Constrain
  dtype: Any
  remat: str
  attention: str


class _Layers(nn.Module):
  """Consecutive layers, the first of them local: one step of the scan."""

  settings: _Settings
  prefix: str
  count: int

  @nn.compact
  def __call__(self, x, positions, cache):
    block = _Block
    if self.settings.remat != 'none':
      policy = remat_policy(self.settings.remat)
      # The scan around it already keeps XLA from merging the two forward
      # passes; in the tail the barrier has to.
      block = nn.remat(
          _Block, policy=policy, prevent_cse=self.prefix == 'tail'
      )
    new_cache = {}
    for i in range(self.count):
      name = f'layer_{i}'
      x, new_cache[name] = block(
          self.settings, f'{self.prefix}/{name}/', i, name=name
      )(x, positions, cache and cache[name])
    return x, new_cache


class _Block(nn.Module):
  """One layer: attention, then the gated MLP, four norms."""

  settings: _Settings
  prefix: str
  index: int

  @nn.compact
  def __call__(self, x, positions, cache):
    c, dtype = self.settings.config, self.settings.dtype
    specs = weights.layer_specs(c)
    w = {n: _weight(self, self.settings, self.prefix, n, specs) for n in specs}
    put = self.settings.constrain

    def see(y, name):
      if self.is_mutable_collection('range'):
        self.sow('range', name, jnp.max(jnp.abs(y)).astype(jnp.float32),
                 init_fn=lambda: 0.0, reduce_fn=jnp.maximum)
      return y

    def product(y, name):
      if name in READERS and self.is_mutable_collection('gram'):
        self.sow('gram', name, layers.gram(y, specs[name].contraction, dtype),
                 init_fn=lambda: 0.0, reduce_fn=lambda old, new: old + new)
      if name in READERS and self.is_mutable_collection('input'):
        self.sow('input', name, y)
      return layers.contract(y, w[name], specs[name].contraction, dtype)

    norm = lambda y, name: layers.rms_norm(y, w[name], c.norm_epsilon)

    x = put(x, _STREAM)
    y = norm(x, 'attn_pre_norm')
    q = norm(put(product(y, 'attn_q'), _HEADS), 'attn_q_norm')
    k = norm(put(product(y, 'attn_k'), _KV_HEADS), 'attn_k_norm')
    v = put(product(y, 'attn_v'), _KV_HEADS)
    is_global = c.is_global(self.index)
    base = c.rope_base_global if is_global else c.rope_base_local
    scaling = c.rope_scaling if is_global else 1.0
    window = None if is_global else c.sliding_window
    q = layers.rope(q, positions, base, scaling) * c.query_scale
    k = layers.rope(k, positions, base, scaling)
    if cache is None:
      y = attention.attend(q, k, v, window, dtype, self.settings.attention)
    else:
      cache, mask = _extend(cache, k, v, positions, window)
      y = attention.attend_cached(q, cache['k'], cache['v'], mask, dtype)
    y = put(product(put(y, _HEADS), 'attn_o').astype(x.dtype), _STREAM)
    x += norm(see(y, 'attention'), 'attn_post_norm')

    y = norm(x, 'mlp_pre_norm')
    gate, up = (put(product(y, n), _MLP) for n in ('mlp_gate', 'mlp_up'))
    y = see(layers.gelu(gate) * up, 'gated')
    y = see(put(product(y, 'mlp_down').astype(x.dtype), _STREAM), 'mlp')
    x += norm(y, 'mlp_post_norm')
    return see(x, 'stream'), cache


def embed(model: Transformer, rows):
  """Makes of the embedding's rows [B, L, D] what the first layer reads."""
  multiplier = jnp.float32(model.config.embedding_multiplier)
  if model.round_embedding_multiplier:
    multiplier = multiplier.astype(jnp.bfloat16)
  return rows.astype(model.residual_dtype) * multiplier.astype(
      model.residual_dtype
  )


def apply_layer(
    model: Transformer, layer: int, params: Mapping[str, jax.Array], x
):
  """Computes one layer alone, with its weights as they are.

  Args:
    model: whose layer; its `intercept` sees nothing.
    layer: its number.
    params: name of a weight in `weights.layer_specs` -> array.
    x: [B, L, D], what the layers before left, or `embed`.

  Returns:
    ([B, L, D] after the layer, {name: [B, L, inputs...] that its matrix reads,
    under the first name of those that share them (`READERS`)}).
  """
  settings = dataclasses.replace(model.settings(), intercept=identity)
  index = layer % model.config.pattern
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  (x, _), read = _Block(settings, '', index).apply(
      {'params': params}, x, positions, None, mutable=['input']
  )
  return x, {name: y for name, (y,) in read['input'].items()}


def unembed(hidden, embedding, dtype=jnp.float32):
  """Multiplies hidden states with the tied head.

  Args:
    hidden: [..., D].
    embedding: [V, D], as intercepted.
    dtype: of the operands.

  Returns:
    float32 logits [..., V]. For losses over many positions use
    `losses.linear_kl`, which never holds them all.
  """
  return layers.contract(hidden, embedding, 1, dtype)


def init_cache(
    config: model_config.ModelConfig,
    batch: int,
    length: int,
    dtype=jnp.float32,
):
  """Makes an empty key/value cache for `length` positions of each sequence.

  In the dtype of the products nothing is lost: they cast what they read.
  """
  c = config
  def empty(*lead):
    shape = (*lead, batch, length, c.num_kv_heads, c.head_dim)
    return {'k': jnp.zeros(shape, dtype), 'v': jnp.zeros(shape, dtype)}
  cache = {}
  if c.num_groups:
    cache['groups'] = {
        f'layer_{i}': empty(c.num_groups) for i in range(c.pattern)
    }
  if c.num_tail_layers:
    cache['tail'] = {f'layer_{i}': empty() for i in range(c.num_tail_layers)}
  return cache


def remat_policy(name: str):
  """Returns the policy of that name, or a UserError that lists them."""
  if name not in REMAT_POLICIES:
    raise errors.UserError(
        f'Unknown remat policy {name!r}: choose one of '
        f'{", ".join(REMAT_POLICIES)}.'
    )
  return REMAT_POLICIES[name]


def _weight(module, settings, prefix, name, specs, rows=None) -> jax.Array:
  """Declares a weight and returns it, or some of its rows, intercepted.

  Reads the variable itself instead of calling `Module.param` on it, since that
  insists on a single array of the declared shape, and what stands in for a
  weight may be codes and scales.
  """
  spec = specs[name]
  if module.is_initializing():
    leaf = module.param(name, _initializer(spec), spec.shape)
    return leaf if rows is None else jnp.take(leaf, rows, axis=0)
  leaf = module.get_variable('params', name)
  if leaf is None:
    raise errors.UserError(f'The weight {prefix}{name} is missing.')
  if rows is not None:
    leaf = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), leaf)
  return settings.intercept(prefix + name, leaf)


def _initializer(spec: weights.WeightSpec):
  if not spec.contraction:
    return nn.initializers.zeros_init()
  return nn.initializers.normal(spec.row_length**-0.5)


def _extend(cache, k, v, positions, window):
  """Writes new keys and values at their positions; says what is visible."""
  # Every sequence of a batch stands at the same position: one slice update.
  start = (0, positions[0, 0], 0, 0)
  cache = {
      name: jax.lax.dynamic_update_slice(
          cache[name], x.astype(cache[name].dtype), start
      )
      for name, x in (('k', k), ('v', v))
  }
  keys = jnp.broadcast_to(
      jnp.arange(cache['k'].shape[1]), (k.shape[0], cache['k'].shape[1])
  )
  return cache, attention.visible(positions, keys, window)
