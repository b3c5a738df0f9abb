"""What would overflow float16 is found, layer by layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.model import config as model_config
from gemma_qat.model import ranges
from gemma_qat.model import transformer

# One group of two layers and one in the tail.
CONFIG = dataclasses.replace(
    model_config.variant('tiny'), num_layers=5, pattern=2
)
TOKENS = jnp.arange(12, dtype=jnp.int32)[None]


@pytest.fixture(scope='module')
def model():
  made = transformer.Transformer(CONFIG, dtype=jnp.float32, remat='none')
  return made, jax.jit(made.init)(jax.random.key(0), TOKENS)['params']


def _seen(model, params):
  plain = model.apply({'params': params}, TOKENS)
  states, seen = model.apply({'params': params}, TOKENS, mutable='range')
  np.testing.assert_array_equal(states, plain)
  return ranges.by_layer(CONFIG, seen['range'])


def test_every_layer_shows_its_largest_numbers(model):
  found = _seen(*model)
  assert len(found) == 4 * CONFIG.num_layers
  assert all(0 < x < 1e4 for x in found.values())
  # A stream that nothing is taken from.
  assert 'layer 4, residual stream' in found
  said = ranges.summary(found)
  assert said['largest'] == max(found.values()) == found[said['at']]
  assert not said['beyond_float16']


def test_what_overflows_is_named_with_its_layer(model):
  network, params = model
  # Both factors of the gate grow a hundredfold, in the second group's first
  # layer: number 2.
  grown = jax.tree.map(lambda x: x, params)
  layer = dict(grown['groups']['layer_0'])
  layer['mlp_down'] = layer['mlp_down'].at[1].multiply(1e7)
  grown = {**grown, 'groups': {**grown['groups'], 'layer_0': layer}}
  said = ranges.summary(_seen(network, grown))
  assert said['at'] == 'layer 2, output of the MLP'
  assert said['beyond_float16'] == ['layer 2, output of the MLP']


def test_the_widest_of_several_texts_counts():
  known = {'a': 1.0}
  ranges.widen(known, {'a': 3.0, 'b': 2.0})
  ranges.widen(known, {'a': 2.0})
  assert known == {'a': 3.0, 'b': 2.0}
  assert ranges.summary(known | {'c': float('nan')})['beyond_float16'] == ['c']
