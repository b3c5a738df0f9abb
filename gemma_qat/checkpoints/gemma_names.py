"""What is each weight called in Google's own checkpoints, and how does it lie?

Google's `gemma` library reads and writes several forms of one tree. All are
brought to one normal form first, in which a name is a path such as
'layer_0/attn/q_einsum/w' or 'vision/embedding/kernel':

  flat, as on Kaggle: {'transformer/layer_0/mlp/linear': {'w': ...}},
    {'SigLiPFromPatches_0/siglip_encoder/embedding': {'kernel': ...}};
  nested, as `model.init` returns it: {'layer_0': {'mlp': {'linear': ...}}},
    {'vision_encoder': {'siglip_encoder': ...}}, below 'params' or not;
  stacked: 'transformer/stacked_layers/attention_type_1/...' has layers 1, 1 +
    pattern ... on its first axis; likewise 'encoderblock' of a scanned tower.

Source: gemma/gm/ckpts/_checkpoint.py, _compat.py and gemma/gm/nn of the
library, version 3.3.0; the parameter tree of Gemma3_4B.
"""

from collections.abc import Mapping
import itertools
import re
from typing import NamedTuple

from gemma_qat.model import config as model_config
from gemma_qat.model import vision as vision_config
from gemma_qat.model import weights as model_weights

FLAT_TEXT = 'transformer/'
FLAT_VISION = 'SigLiPFromPatches_0/siglip_encoder/'
_LEVELS = ('rlx_networks/policy_network/', 'params/', FLAT_TEXT)
_VISION = (FLAT_VISION, 'vision_encoder/siglip_encoder/')
# What a whole training state of the library has beside 'params'.
_STATE = ('opt_state/', 'step', 'collections/')
# More axes on the first one than any model has layers.
_MOST_LAYERS = 1000
_STACKED = re.compile(
    r'(?:stacked_layers/attention_type_(?P<type>[0-9]{1,3})'
    r'|(?P<block>vision/Transformer/encoderblock))/(?P<rest>.*)'
)


class Place(NamedTuple):
  """Where one of our weights lies in a file.

  key: of the array, in the normal form. index: into its first axis, where
  several weights share the array. axes: ours are these of the file's, in this
  order, the index taken out; heads are then flattened where ours are flat.
  """

  key: str
  axes: tuple[int, ...]
  index: int | None = None


OUTER = {
    'embedding': Place('embedder/input_embedding', (0, 1)),
    'final_norm': Place('final_norm/scale', (0,)),
}
# Behind 'layer_<i>/'.
LAYER = {
    'attn_pre_norm': Place('pre_attention_norm/scale', (0,)),
    'attn_q': Place('attn/q_einsum/w', (0, 2, 1)),
    'attn_k': Place('attn/kv_einsum/w', (0, 2, 1), 0),
    'attn_v': Place('attn/kv_einsum/w', (0, 2, 1), 1),
    'attn_q_norm': Place('attn/_query_norm/scale', (0,)),
    'attn_k_norm': Place('attn/_key_norm/scale', (0,)),
    'attn_o': Place('attn/attn_vec_einsum/w', (2, 0, 1)),
    'attn_post_norm': Place('post_attention_norm/scale', (0,)),
    'mlp_pre_norm': Place('pre_ffw_norm/scale', (0,)),
    'mlp_gate': Place('mlp/gating_einsum/w', (0, 1), 0),
    'mlp_up': Place('mlp/gating_einsum/w', (0, 1), 1),
    'mlp_down': Place('mlp/linear/w', (1, 0)),
    'mlp_post_norm': Place('post_ffw_norm/scale', (0,)),
}
VISION_OUTER = {
    'patches/kernel': Place('vision/embedding/kernel', (3, 2, 0, 1)),
    'patches/bias': Place('vision/embedding/bias', (0,)),
    'positions': Place('vision/pos_embedding', (0, 1), 0),
    'post_norm/scale': Place('vision/Transformer/encoder_norm/scale', (0,)),
    'post_norm/bias': Place('vision/Transformer/encoder_norm/bias', (0,)),
    'projector/kernel': Place('embedder/mm_input_projection/w', (0, 1)),
    'projector/norm': Place('embedder/mm_soft_embedding_norm/scale', (0,)),
}
# Behind 'vision/Transformer/encoderblock_<i>/'.
_ATTENTION = 'MultiHeadDotProductAttention_0'
VISION_LAYER = {
    'norm_1/scale': Place('LayerNorm_0/scale', (0,)),
    'norm_1/bias': Place('LayerNorm_0/bias', (0,)),
    'norm_2/scale': Place('LayerNorm_1/scale', (0,)),
    'norm_2/bias': Place('LayerNorm_1/bias', (0,)),
    'attn_q/kernel': Place(f'{_ATTENTION}/query/kernel', (1, 2, 0)),
    'attn_q/bias': Place(f'{_ATTENTION}/query/bias', (0, 1)),
    'attn_k/kernel': Place(f'{_ATTENTION}/key/kernel', (1, 2, 0)),
    'attn_k/bias': Place(f'{_ATTENTION}/key/bias', (0, 1)),
    'attn_v/kernel': Place(f'{_ATTENTION}/value/kernel', (1, 2, 0)),
    'attn_v/bias': Place(f'{_ATTENTION}/value/bias', (0, 1)),
    'attn_o/kernel': Place(f'{_ATTENTION}/out/kernel', (2, 0, 1)),
    'attn_o/bias': Place(f'{_ATTENTION}/out/bias', (0,)),
    'mlp_up/kernel': Place('MlpBlock_0/Dense_0/kernel', (1, 0)),
    'mlp_up/bias': Place('MlpBlock_0/Dense_0/bias', (0,)),
    'mlp_down/kernel': Place('MlpBlock_0/Dense_1/kernel', (1, 0)),
    'mlp_down/bias': Place('MlpBlock_0/Dense_1/bias', (0,)),
}
# Stand in some public files of 4B and larger and take no part in the model.
IGNORED = ('embedder/mm_input_embedding_extra', 'embedder/mm_output_embedding')


def places(config: model_config.ModelConfig) -> dict[str, Place]:
  """Maps by-layer names to their places, in file order."""
  found = {}
  for name in model_weights.by_layer_specs(config):
    layer, slash, kind = name.partition('/')
    place = LAYER[kind] if slash else OUTER[name]
    found[name] = place._replace(key=f'{layer}/{place.key}') if slash else place
  return found


def vision_places(config: vision_config.VisionConfig) -> dict[str, Place]:
  """Maps the tower's names to their places, in file order."""
  found = {}
  for name in vision_config.specs(config):
    if name in VISION_OUTER:
      found[name] = VISION_OUTER[name]
      continue
    layer, _, kind = name.partition('/')
    block = f'encoderblock_{layer.removeprefix("layer_")}'
    place = VISION_LAYER[kind]
    found[name] = place._replace(
        key=f'vision/Transformer/{block}/{place.key}'
    )
  return found


def normal_form(
    shapes: Mapping[str, tuple[int, ...]],
) -> list[tuple[str, str, int | None]]:
  """Gives every weight of a file its normal name.

  Args:
    shapes: keys of an array, joined with '/', in any form -> its shape.

  Returns:
    (normal name, keys, None), or (normal name, keys, index) for each layer of
    a stacked array. What is no weight is left out.
  """
  found = []
  paths = {keys: _path(keys) for keys in shapes}
  stacked = {
      keys: match for keys, path in paths.items()
      if (match := _STACKED.fullmatch(path))
      and 0 < len(shapes[keys]) and shapes[keys][0] <= _MOST_LAYERS
  }
  pattern = 1 + max((int(m['type']) for m in stacked.values() if m['type']),
                    default=0)
  for keys, path in paths.items():
    if path.startswith(_STATE):
      continue
    if keys not in stacked:
      found.append((path, keys, None))
      continue
    block, kind, rest = stacked[keys].group('block', 'type', 'rest')
    for i in range(shapes[keys][0]):
      layer = f'{block}_{i}' if block else f'layer_{i * pattern + int(kind)}'
      found.append((f'{layer}/{rest}', keys, i))
  return found


def file_shapes(
    specs: Mapping[str, model_weights.WeightSpec],
    named: Mapping[str, Place],
    num_heads: int = 1,
) -> dict[str, tuple[int, ...]]:
  """Maps the keys of `named` to the shapes of the arrays there.

  Args:
    specs: our name -> declaration.
    named: our name -> place.
    num_heads: of the tower, whose heads a file keeps on their own axis.
  """
  shapes = {}
  for name, spec in specs.items():
    place = named[name]
    ours = list(spec.shape)
    if len(place.axes) > len(ours):
      # Heads and head width are neighbours in the file, in this order.
      i = next(
          i for i, (a, b) in enumerate(itertools.pairwise(place.axes))
          if b == a + 1
      )
      ours[i : i + 1] = [num_heads, ours[i] // num_heads]
    shape = [0] * len(ours)
    for size, axis in zip(ours, place.axes, strict=True):
      shape[axis] = size
    # The indices of an array come in order: the last one counts them.
    first = () if place.index is None else (place.index + 1,)
    shapes[place.key] = (*first, *shape)
  return shapes


def flat(key: str) -> tuple[str, str]:
  """Returns the two keys of a normal name in the flat form."""
  if key.startswith('vision/'):
    key = FLAT_VISION + key.removeprefix('vision/')
  else:
    key = FLAT_TEXT + key
  outer, _, inner = key.rpartition('/')
  return outer, inner


def _path(keys):
  """Drops the levels above the model, and tells the tower by one name."""
  for level in _LEVELS:
    keys = keys.removeprefix(level)
  for tower in _VISION:
    if keys.startswith(tower):
      keys = f'vision/{keys.removeprefix(tower)}'
  if keys.endswith(('/mlp/linear', '/mlp/gating_einsum')):
    keys += '/w'
  return keys
