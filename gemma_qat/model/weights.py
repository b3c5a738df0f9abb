"""Which weights does a Gemma 3 have, and how do blocks run through them?

Every weight is declared here once. Matrices are stored [outputs, inputs], so
the axes that a product contracts are always the last ones: blocks of 32 are
contiguous, and a row is a row of a GGUF or Hugging Face tensor.

Two views of the same weights:
  * the tree: what the model takes. Whole groups of six layers are stacked on a
    leading axis ('groups/layer_0/attn_q' [G, N, H, D] holds layers 0, 6, 12
    ...), the remaining layers stand alone ('tail/layer_0/attn_q' [N, H, D]);
  * by layer: what files hold. A flat dict 'layer_7/attn_q' -> [N, H, D].
"""

import dataclasses
import math
from typing import Any, Mapping

from flax import traverse_util
import numpy as np

from gemma_qat import errors
from gemma_qat.model import config as model_config


@dataclasses.dataclass(frozen=True)
class WeightSpec:
  """One declared weight.

  Attributes:
    shape: sizes of the axes, without the stacking axis.
    axes: logical axis names, one per axis; sharding rules map them to a mesh.
    contraction: how many trailing axes a matrix product sums over; 0 for
      vectors of gains.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  contraction: int

  @property
  def is_stacked(self) -> bool:
    """Whether the first axis is one of layers."""
    return self.axes[0] == 'layers'

  @property
  def row_length(self) -> int:
    """Number of inputs of one output: the axis that blocks divide."""
    return math.prod(self.shape[len(self.shape) - self.contraction :])


def layer_specs(c: model_config.ModelConfig) -> dict[str, WeightSpec]:
  """Declares the weights of one layer."""
  d, n, k, h, f = (
      c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_dim
  )
  norm = WeightSpec((d,), ('norm',), 0)
  head_norm = WeightSpec((h,), ('norm',), 0)
  kv = WeightSpec((k, h, d), ('kv_heads', 'head_dim', 'embed'), 1)
  up = WeightSpec((f, d), ('mlp', 'embed'), 1)
  return {
      'attn_pre_norm': norm,
      'attn_q': WeightSpec((n, h, d), ('heads', 'head_dim', 'embed'), 1),
      'attn_k': kv,
      'attn_v': kv,
      'attn_q_norm': head_norm,
      'attn_k_norm': head_norm,
      'attn_o': WeightSpec((d, n, h), ('embed', 'heads', 'head_dim'), 2),
      'attn_post_norm': norm,
      'mlp_pre_norm': norm,
      'mlp_gate': up,
      'mlp_up': up,
      'mlp_down': WeightSpec((d, f), ('embed', 'mlp'), 1),
      'mlp_post_norm': norm,
  }


def outer_specs(c: model_config.ModelConfig) -> dict[str, WeightSpec]:
  """Declares the weights that stand outside the layers."""
  return {
      'embedding': WeightSpec(
          (c.vocab_size, c.embed_dim), ('vocab', 'embed'), 1
      ),
      'final_norm': WeightSpec((c.embed_dim,), ('norm',), 0),
  }


def by_layer_specs(c: model_config.ModelConfig) -> dict[str, WeightSpec]:
  """Declares every weight under its by-layer name, in file order."""
  specs = dict(outer_specs(c))
  for i in range(c.num_layers):
    specs |= {f'layer_{i}/{name}': s for name, s in layer_specs(c).items()}
  return specs


def tree_specs(c: model_config.ModelConfig) -> dict[str, WeightSpec]:
  """Declares every weight under its path in the tree, stacking axis included.
  """
  specs = dict(outer_specs(c))
  for name, s in layer_specs(c).items():
    for i in range(c.pattern if c.num_groups else 0):
      specs[f'groups/layer_{i}/{name}'] = dataclasses.replace(
          s, shape=(c.num_groups, *s.shape), axes=('layers', *s.axes)
      )
    for i in range(c.num_tail_layers):
      specs[f'tail/layer_{i}/{name}'] = s
  return specs


def stack(c: model_config.ModelConfig, flat: Mapping[str, Any]) -> dict:
  """Makes the tree out of by-layer arrays.

  Args:
    c: the sizes.
    flat: by-layer name -> array.

  Returns:
    The nested tree of numpy arrays.

  Raises:
    UserError: a weight is missing, unknown or of the wrong shape (named).
  """
  check(by_layer_specs(c), flat)
  tree = {}
  for path in tree_specs(c):
    layers = layer_names(c, path)
    if path.startswith('groups/'):
      tree[path] = np.stack([flat[name] for name in layers])
    else:
      tree[path] = flat[layers[0]]
  return traverse_util.unflatten_dict(tree, sep='/')


def layer_names(c: model_config.ModelConfig, path: str) -> list[str]:
  """By-layer names of what stands at a path of the tree, in stacked order."""
  kind, _, rest = path.partition('/')
  if kind not in ('groups', 'tail'):
    return [path]
  layer, _, name = rest.partition('/')
  first = int(layer.removeprefix('layer_'))
  if kind == 'tail':
    return [f'layer_{c.num_groups * c.pattern + first}/{name}']
  return [
      f'layer_{g * c.pattern + first}/{name}' for g in range(c.num_groups)
  ]


def unstack(c: model_config.ModelConfig, tree: Mapping[str, Any]) -> dict:
  """Undoes `stack`: the tree's arrays under their by-layer names.

  A weight may stand in the tree as a dict of arrays (codes and scales); each
  then keeps its own name behind the weight's: 'layer_7/attn_q/scale'.
  """
  flat = {}
  for path, array in traverse_util.flatten_dict(tree, sep='/').items():
    names = layer_names(c, path)
    if path.startswith('groups/'):
      flat |= {name: array[g] for g, name in enumerate(names)}
    else:
      flat[names[0]] = array
  order = {name: i for i, name in enumerate(by_layer_specs(c))}
  weight = lambda name: name if name in order else name.rpartition('/')[0]
  return dict(sorted(flat.items(), key=lambda kv: order[weight(kv[0])]))


def check(specs: Mapping[str, WeightSpec], flat: Mapping[str, Any]) -> None:
  """Raises a UserError that names what is missing, unknown or misshapen."""
  missing = [n for n in specs if n not in flat]
  unknown = [n for n in flat if n not in specs]
  if missing or unknown:
    parts = []
    if missing:
      parts.append(f'{len(missing)} weights are missing ({_few(missing)})')
    if unknown:
      parts.append(f'{len(unknown)} are unknown ({_few(unknown)})')
    raise errors.UserError(
        'The checkpoint does not fit the model: ' + ' and '.join(parts) + '.'
    )
  for name, spec in specs.items():
    if tuple(flat[name].shape) != spec.shape:
      raise errors.UserError(
          f'The checkpoint does not fit the model: {name} has shape '
          f'{tuple(flat[name].shape)}, expected {spec.shape}.'
      )


def _few(names, count=3):
  return ', '.join(names[:count]) + (' ...' if len(names) > count else '')
