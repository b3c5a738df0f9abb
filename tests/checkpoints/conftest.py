"""The small model that the tests of this room write and read."""

import pytest

from gemma_qat.checkpoints import random_weights
from gemma_qat.quant import formats


@pytest.fixture(scope='session')
def tiny():
  return random_weights.load('random:tiny:1')


@pytest.fixture(scope='session')
def mixed(tiny):
  """Tensors of tiny: Q4_0 matrices, Q8_0 embedding, plain norms."""
  tensors = {}
  for name, entry in tiny.weights.entries.items():
    weight = tiny.weights[name]
    if len(entry.shape) > 1:
      number_format = 'q8_0' if name == 'embedding' else 'q4_0'
      weight = (number_format, formats.get(number_format).quantize(weight))
    tensors[name] = weight
  return tensors
