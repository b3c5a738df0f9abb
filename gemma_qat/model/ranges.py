"""Would what a model computes fit float16, which some runtimes compute in?"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_qat.model import config as model_config

FLOAT16_MAX = 65_504.0
# What `transformer` shows of a layer, for people.
_PLACES = {
    'attention': 'output of attention',
    'gated': 'input of mlp_down',
    'mlp': 'output of the MLP',
    'stream': 'residual stream',
}


def by_layer(
    config: model_config.ModelConfig, seen: Mapping[str, Any]
) -> dict[str, float]:
  """Names the magnitudes that a forward pass showed.

  Args:
    config: the sizes.
    seen: the collection 'range' of `Transformer.apply`.

  Returns:
    {'layer 17, residual stream': the largest magnitude ...}.
  """
  found = {}
  for part, layers in seen.items():
    for name, places in layers.items():
      index = int(name.removeprefix('layer_'))
      for place, magnitudes in places.items():
        for group, value in enumerate(np.atleast_1d(np.asarray(magnitudes))):
          layer = index + config.pattern * (
              group if part == 'groups' else config.num_groups
          )
          found[f'layer {layer}, {_PLACES[place]}'] = float(value)
  return found


def widen(
    known: dict[str, float], more: Mapping[str, float]
) -> None:
  """Takes the larger of both for every place, into `known`."""
  for place, value in more.items():
    known[place] = max(known.get(place, 0.0), value)


def summary(known: Mapping[str, float]) -> dict[str, Any]:
  """Says what there is to know: the largest, and what float16 cannot hold."""
  at = max(known, key=known.get)
  return {
      'largest': known[at],
      'at': at,
      'beyond_float16': sorted(
          place for place, x in known.items() if not x <= FLOAT16_MAX
      ),
  }
