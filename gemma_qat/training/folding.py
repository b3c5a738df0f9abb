"""Which channels can be scaled before rounding, and scaled back elsewhere?

A matrix whose input channel c is multiplied by s[c] rounds that channel more
finely, in a block of its neighbours, if s[c] is above theirs; what made the
channel must then divide by s[c]. In Gemma 3 four such places are exact:
  the gains before attention, read by query, key and value;
  the gains before the MLP, read by gate and up;
  the rows of up, read by down (the product with the gate is linear in them);
  the rows of value, read by the output matrix, which sees every key/value
    head as often as query heads share it.
Post-norms normalise what a matrix writes: nothing folds through them. Source of
the idea: Lin et al., AWQ.
"""

import functools
from typing import Any, Callable, Mapping

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.model import config as model_config
from gemma_qat.model import weights
from gemma_qat.quant import lattice

# s = (root mean square of the channel's activations) ^ power; 0 changes nothing.
POWERS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625)
# No channel is scaled by more than this, up or down, beside the mean.
_MOST = 16.0

# What makes the channels, what reads them.
_PLACES = (
    ('attn_pre_norm', ('attn_q', 'attn_k', 'attn_v')),
    ('mlp_pre_norm', ('mlp_gate', 'mlp_up')),
    ('mlp_up', ('mlp_down',)),
    ('attn_v', ('attn_o',)),
)


def fold(
    config: model_config.ModelConfig,
    params: Mapping[str, Any],
    grams: Mapping[str, np.ndarray],
    plan: Mapping[str, lattice.Entry],
    on_place: Callable[[str], None] = lambda path: None,
) -> tuple[dict, dict[str, np.ndarray]]:
  """Scales channels where rounding by the reference rule then loses less.

  The power is chosen layer by layer, by the error of the readers' outputs.

  Args:
    config: the sizes.
    params: the teacher's tree, float32.
    grams: from `calibration.gather_grams`.
    plan: from `student.make_plan`; places no reader of which is quantized are
      left alone.
    on_place: called with the path of every maker of channels.

  Returns:
    (tree of the same function, up to rounding in float32; grams of its
    activations).
  """
  flat = {
      p: np.asarray(x, np.float32)
      for p, x in traverse_util.flatten_dict(dict(params), sep='/').items()
  }
  grams = dict(grams)
  layers = sorted({p.rpartition('/')[0] for p in flat if '/' in p})
  for layer in layers:
    for maker, readers in _PLACES:
      readers = [f'{layer}/{name}' for name in readers]
      if any(p in plan for p in readers):
        _fold_place(config, flat, grams, plan, f'{layer}/{maker}', readers)
      on_place(f'{layer}/{maker}')
  return traverse_util.unflatten_dict(flat, sep='/'), grams


def places(config: model_config.ModelConfig) -> int:
  """How often `fold` calls `on_place`."""
  stacks = config.pattern if config.num_groups else 0
  return len(_PLACES) * (stacks + config.num_tail_layers)


def _fold_place(config, flat, grams, plan, maker, readers):
  specs = weights.layer_specs(config)
  # Copies: changed layer by layer, of which one that is not stacked has one.
  layers = lambda x: x if maker.startswith('groups/') else x[None]
  for path in (maker, *readers):
    flat[path] = np.array(flat[path])
  gram = np.array(grams[readers[0]])
  grams |= dict.fromkeys(readers, gram)
  heads = None
  if maker.endswith('attn_v'):
    heads = config.num_kv_heads, config.num_heads // config.num_kv_heads
  contraction = {p: specs[p.rpartition('/')[2]].contraction for p in readers}
  for i, g in enumerate(layers(gram)):
    activation = np.sqrt(np.maximum(np.diagonal(g), 1e-12))
    activation = _shared(activation, heads)
    rows = {p: _rows(layers(flat[p])[i], contraction[p]) for p in readers}
    losses = [
        sum(
            _loss(rows[p], g, _spread(_scale(activation, power), heads),
                  plan[p][0])
            for p in readers if p in plan
        )
        for power in POWERS
    ]
    power = POWERS[int(np.argmin(losses))]
    if not power:
      continue
    made = _scale(activation, power)
    read = _spread(made, heads)
    for p in readers:
      weight = layers(flat[p])[i]
      weight[...] = (rows[p] * read).reshape(weight.shape)
    g /= np.outer(read, read)
    source = layers(flat[maker])[i]
    if maker.endswith('norm'):
      # The gain is 1 + w.
      source[...] = (1 + source) / made - 1
    else:
      source /= made.reshape(*source.shape[:-1], 1)


def _rows(weight, contraction):
  """[outputs, inputs]."""
  inputs = int(np.prod(weight.shape[weight.ndim - contraction:]))
  return weight.reshape(-1, inputs)


def _shared(activation, heads):
  """One value for the inputs that come of the same row of value."""
  if heads is None:
    return activation
  square = np.square(activation).reshape(*heads, -1)
  return np.sqrt(np.mean(square, axis=1)).reshape(-1)


def _spread(made, heads):
  """Undoes `_shared`: what each input of the reader is multiplied with."""
  if heads is None:
    return made
  rows = made.reshape(heads[0], 1, -1)
  return np.broadcast_to(rows, (*heads, rows.shape[-1])).reshape(-1)


def _scale(activation, power):
  scale = activation**power
  scale = scale / np.exp(np.mean(np.log(scale)))
  return np.clip(scale, 1 / _MOST, _MOST).astype(np.float32)


def _loss(rows, gram, scale, format):
  return float(_output_error(rows, jnp.asarray(gram), scale, format))


@functools.partial(jax.jit, static_argnums=3)
def _output_error(rows, gram, scale, format):
  """Mean squared error of the outputs, summed over them."""
  found = format.quantize(rows * scale[None], 1)
  error = format.dequantize(found) / scale[None] - rows
  return jnp.sum((error @ gram) * error)
