import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.quant import formats
from gemma_qat.quant import lattice

_CASES = [
    (f.name, mode)
    for f in (*formats.FORMATS.values(), formats.get('q4_0_bf16'))
    for mode in lattice.MODES
    if not (mode == 'learned' and f.decode is not None)
]


def _weight(seed=0):
  return jax.random.normal(jax.random.key(seed), (4, 2, 64)) * 0.05


def _trained(node, mode):
  """Moves a node off its start, as training would."""
  if mode == 'fixed':
    return node
  move = lambda x: x * 1.037 + 1e-4 if x.dtype == jnp.float32 else x
  return jax.tree.map(move, node)


@pytest.mark.parametrize('name, mode', _CASES)
def test_the_forward_pass_uses_the_exported_numbers_bit_by_bit(name, mode):
  format_ = formats.get(name)
  node = _trained(lattice.init_node(_weight(), format_, mode, 2), mode)
  stored = lattice.quantized(node, format_, mode, 2)
  assert stored.codes.dtype == jnp.int8
  values = np.asarray(format_.dequantize(stored))
  intercept = lattice.make_intercept({'w': (format_, mode, 2)})
  np.testing.assert_array_equal(intercept('w', node), values)
  jitted = jax.jit(lambda node: intercept('w', node))(node)
  np.testing.assert_array_equal(jitted, values)
  assert jitted.dtype == jnp.float32
  # The scale in the file is the scale in the forward pass, rounding included.
  np.testing.assert_array_equal(
      stored.scale, format_.stored_scale(stored.scale)
  )


@pytest.mark.parametrize('name', ['q4_0', 'q8_0'])
@pytest.mark.parametrize('mode', ['learned', 'codes'])
def test_trained_nodes_survive_the_file(name, mode):
  format_ = formats.get(name)
  node = _trained(lattice.init_node(_weight(), format_, mode, 2), mode)
  stored = lattice.quantized(node, format_, mode, 2)
  again = format_.unpack(format_.pack(stored), stored.codes.shape)
  np.testing.assert_array_equal(again.codes, stored.codes)
  np.testing.assert_array_equal(again.scale, stored.scale)


def test_two_plans_in_one_process_differ_and_leave_other_paths_alone():
  weight = _weight()
  plans = [
      lattice.make_intercept({'a': (formats.get(name), 'derived', 2)})
      for name in ('q4_0', 'int4')
  ]
  q4_0, int4 = (intercept('a', weight) for intercept in plans)
  assert np.any(q4_0 != int4)
  for intercept in plans:
    assert intercept('b', weight) is weight
  np.testing.assert_array_equal(plans[0]('a', weight), q4_0)


def test_a_layer_of_a_stack_is_intercepted_as_if_alone():
  entry = (formats.get('q4_0'), 'learned', 2)
  intercept = lattice.make_intercept({'w': entry})
  stack = lattice.init_node(jnp.stack([_weight(0), _weight(1)]), *entry)
  whole = intercept('w', stack)
  for i in range(2):
    layer = jax.tree.map(lambda x: x[i], stack)
    np.testing.assert_array_equal(intercept('w', layer), whole[i])


def test_given_codes_and_scales_are_kept():
  q4_0 = formats.get('q4_0')
  start = q4_0.quantize(_weight(1), 2)
  node = lattice.init_node(
      _weight(), q4_0, 'codes', 2, start.scale, start.codes
  )
  kept = lattice.quantized(node, q4_0, 'codes', 2)
  np.testing.assert_array_equal(kept.codes, start.codes)
  np.testing.assert_array_equal(kept.scale, start.scale)


def test_a_given_scale_rounds_the_weight():
  q4_0 = formats.get('q4_0')
  scale = -q4_0.quantize(_weight(), 2).scale * 0.9
  for mode in ('learned', 'codes'):
    node = lattice.init_node(_weight(), q4_0, mode, 2, scale)
    codes = lattice.quantized(node, q4_0, mode, 2).codes
    np.testing.assert_array_equal(codes, q4_0.codes_for(_weight(), scale))


def test_codes_get_no_gradient_and_scales_the_exact_one():
  q4_0 = formats.get('q4_0')
  node = lattice.init_node(_weight(), q4_0, 'codes', 2)
  intercept = lattice.make_intercept({'w': (q4_0, 'codes', 2)})
  grad = jax.grad(lambda n: intercept('w', n).sum(), allow_int=True)(node)
  assert grad['codes'].dtype == jax.dtypes.float0
  levels = node['codes'].astype(jnp.float32) - 8
  np.testing.assert_allclose(
      grad['scale'], levels.reshape(4, 2, 2, 32).sum(-1), rtol=1e-6
  )


def test_fixed_values_off_the_lattice_are_refused():
  q8_0 = formats.get('q8_0')
  with pytest.raises(errors.UserError, match='of 512 fixed weights.*q8_0'):
    lattice.quantized(_weight(), q8_0, 'fixed', 2)


def test_an_unknown_mode_lists_the_known():
  with pytest.raises(errors.UserError, match='derived, learned, codes, fixed'):
    lattice.make_intercept({'w': (formats.get('q4_0'), 'frozen', 1)})


def test_a_learned_scale_needs_equal_steps():
  with pytest.raises(errors.UserError, match='sfp8'):
    lattice.init_node(_weight(), formats.get('sfp8'), 'learned', 2)
