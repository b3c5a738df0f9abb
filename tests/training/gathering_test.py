"""Weights travel as codes and scales, and nothing changes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import sharding
from gemma_qat.model import config as model_config
from gemma_qat.quant import formats
from gemma_qat.quant import lattice
from gemma_qat.training import gathering

# Four blocks of inputs, so that fsdp can part them.
CONFIG = dataclasses.replace(model_config.variant('tiny'), embed_dim=128)
SHAPES = {'mlp_up': (96, 128), 'attn_o': (128, 4, 32)}
AXES = {'mlp_up': ('mlp', 'embed'), 'attn_o': ('embed', 'heads', 'head_dim')}


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(data=2, fsdp=4)


def _node(mesh, name, mode, format_name):
  """A node on the mesh, some of whose scales are float16 subnormals."""
  fmt = formats.get(format_name)
  draw = np.random.default_rng(0).standard_normal(SHAPES[name], np.float32)
  draw[::3] *= np.float32(1e-6)
  contraction = len(SHAPES[name]) - 1
  node = lattice.init_node(draw, fmt, mode, contraction)
  axes = lambda x: [
      None if n == 1 else a for a, n in zip(AXES[name], x.shape)
  ]
  place = lambda x: jax.device_put(x, sharding.named(mesh, axes(x)))
  return (fmt, mode, contraction), jax.tree.map(place, node)


def _gather(mesh, name, entry, choice):
  plan = {f'tail/layer_0/{name}': entry}
  plain = lattice.make_intercept(plan)
  gather = gathering.make_gather(
      plain, plan, mesh, CONFIG, choice, jnp.float32
  )
  bind = lambda f: lambda node: f(f'tail/layer_0/{name}', node)
  return bind(plain), bind(gather)


@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('mode, format_name', [
    ('codes', 'q4_0'), ('learned', 'q4_0'), ('derived', 'q4_0'),
    ('derived', 'q8_0'), ('derived', 'int4'), ('derived', 'sfp8'),
])
@pytest.mark.parametrize('choice', gathering.CHOICES)
def test_gathered_weights_and_their_gradients_are_the_same_bits(
    mesh, name, mode, format_name, choice
):
  entry, node = _node(mesh, name, mode, format_name)
  plain, gather = _gather(mesh, name, entry, choice)
  direction = np.random.default_rng(1).standard_normal(
      SHAPES[name], np.float32
  )

  def value_and_gradient(f):
    def total(node):
      weight = f(node)
      return jnp.sum(weight * direction), weight
    return jax.jit(jax.grad(total, has_aux=True, allow_int=True))(node)

  (expected, weight), (found, ours) = map(value_and_gradient, (plain, gather))
  np.testing.assert_array_equal(ours, weight)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    if y.dtype != jax.dtypes.float0:
      # Sums over a block in another order.
      np.testing.assert_allclose(x, y, atol=1e-6 * np.abs(y).max())


def _gathered_bytes(compiled):
  """Bytes that each device has after the all-gathers of a program."""
  sizes = {'u8': 1, 's8': 1, 'u16': 2, 'bf16': 2, 'f32': 4, 'u32': 4, 's32': 4}
  total = 0
  for line in compiled.as_text().splitlines():
    if ' all-gather(' in line:
      for dtype, shape in re.findall(r'(\w+)\[([\d,]+)\]', line.split('=')[1]
                                     .split(' all-gather(')[0]):
        total += sizes[dtype] * int(np.prod([int(n) for n in shape.split(',')]))
  return total


@pytest.mark.parametrize('mode', ['codes', 'learned', 'derived'])
def test_q4_0_travels_in_four_and_a_half_bits(mesh, mode):
  entry, node = _node(mesh, 'mlp_up', mode, 'q4_0')
  found = {}
  for choice in gathering.CHOICES:
    _, gather = _gather(mesh, 'mlp_up', entry, choice)
    found[choice] = _gathered_bytes(jax.jit(gather).lower(node).compile())
  count = np.prod(SHAPES['mlp_up'])
  # This test multiplies in float32: a bfloat16 weight would be 2 bytes.
  assert found == {'weights': 4 * count, 'codes': count * 4.5 / 8}


def test_one_part_needs_no_gathering():
  intercept = lattice.make_intercept({})
  assert gathering.make_gather(
      intercept, {}, sharding.make_mesh(data=8), CONFIG, 'codes', jnp.float32
  ) is intercept
