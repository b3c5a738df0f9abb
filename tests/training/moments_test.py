"""Moments kept small move the weights as float32 moments do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_qat import sharding
from gemma_qat.training import eight_bits
from gemma_qat.training import moments

SHAPE = (64, 64)
# Columns of one block are up to 1e8 apart.
SPREAD = np.broadcast_to(10 ** (-8 / 31 * (np.arange(64) % 32)), SHAPE)
SPREAD = SPREAD.astype(np.float32)


@pytest.fixture(scope='module')
def run():
  """Returns run(kind, b2) -> (sum of updates, largest update)."""
  def run(kind, b2, steps=300):
    adam = moments.scale_by_adam(0.9, b2, 1e-30, kind)

    def body(carry, step):
      state, moved, largest = carry
      key = jax.random.fold_in(jax.random.key(0), step)
      # Mostly noise, as a batch's gradient is.
      gradient = SPREAD * (0.3 + jax.random.normal(key, SHAPE))
      update, state = adam.update(gradient, state)
      largest = jnp.maximum(largest, jnp.max(jnp.abs(update)))
      return (state, moved + update, largest), None

    start = adam.init(jnp.zeros(SHAPE)), jnp.zeros(SHAPE), jnp.zeros(())
    (_, moved, largest), _ = jax.lax.scan(body, start, jnp.arange(steps))
    return moved, largest

  return jax.jit(run, static_argnums=(0, 1))


@pytest.mark.parametrize('kind, b2, tolerance', [
    # Measured on this case: 0.0019, 0.0052, 0.040, 0.093.
    ('bfloat16', 0.95, 0.003), ('bfloat16', 0.999, 0.008),
    ('int8', 0.95, 0.05), ('int8', 0.999, 0.11),
])
def test_gradients_of_eight_orders_in_a_block_move_as_in_float32(
    run, kind, b2, tolerance
):
  expected, largest_expected = run('float32', b2)
  moved, largest = run(kind, b2)
  # Column by column: the smallest gradients are followed as the largest.
  error = np.linalg.norm(moved - expected, axis=0)
  assert (error < 2 * tolerance * np.linalg.norm(expected, axis=0)).all()
  assert np.linalg.norm(error) < tolerance * np.linalg.norm(expected)
  assert abs(np.mean(moved / expected) - 1) < 0.04
  assert largest < 1.5 * largest_expected


@pytest.mark.parametrize('kind', ['bfloat16', 'int8'])
def test_moments_that_change_by_less_than_a_step_are_right_on_average(kind):
  # 1 - b2 is a fiftieth of a step in 8 bits, a quarter in bfloat16.
  adam = moments.scale_by_adam(0.9, 0.999, 1e-8, kind)
  gradient = jnp.ones(SHAPE)

  @jax.jit
  def after(steps):
    state = adam.init(gradient)
    state = jax.lax.fori_loop(
        0, steps, lambda _, s: adam.update(gradient, s)[1], state
    )
    return state.mu, state.nu

  first, second = after(700)
  if kind == 'int8':
    first, second = eight_bits.unpack(first, second)
  expected = 1 - 0.999**700
  assert float(jnp.mean(second.astype(jnp.float32))) == pytest.approx(
      expected, rel=0.02
  )
  assert float(jnp.mean(first.astype(jnp.float32))) == pytest.approx(
      1, rel=0.03
  )


def _pack(first, second, seed=0):
  bits = moments.random_bits(first.shape, jnp.uint32(seed))
  return eight_bits.pack(
      jnp.asarray(first), jnp.asarray(second), bits, limit=1.5
  )


def test_a_second_moment_is_never_lost_and_one_step_off_at_most():
  draw = np.random.default_rng(0)
  second = np.square(SPREAD * draw.uniform(0.5, 2, SHAPE).astype(np.float32))
  _, found = eight_bits.unpack(*_pack(np.zeros_like(second), second))
  ratio = np.asarray(found) / second
  assert 0.8 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.25
  # On average it is exact.
  assert abs(ratio.mean() - 1) < 0.005
  # Below 63 octaves: too large, never zero.
  second[:, 1] = 1e-25
  _, found = eight_bits.unpack(*_pack(np.zeros_like(second), second))
  assert (np.asarray(found)[:, 1] > 1e-25).all()


def test_zero_stays_zero():
  second = np.ones(SHAPE, np.float32)
  second[:, ::2] = 0
  second[0] = 0
  first, again = eight_bits.unpack(*_pack(np.sqrt(second), second))
  np.testing.assert_array_equal(np.asarray(again) == 0, second == 0)
  np.testing.assert_array_equal(np.asarray(first)[second == 0], 0)


def test_a_second_moment_that_can_be_kept_is_kept():
  draw = np.random.default_rng(1)
  second = np.square(draw.standard_normal(SHAPE, np.float32))
  zeros = np.zeros_like(second)
  _, values = eight_bits.unpack(*_pack(zeros, second))
  # Whatever the largest of its block.
  louder = np.array(values)
  louder[:, ::32] *= 1e6
  for given in (values, louder):
    _, again = eight_bits.unpack(*_pack(zeros, given, seed=1))
    np.testing.assert_array_equal(again[:, 1:32], values[:, 1:32])


def test_a_first_moment_is_right_within_a_step_of_its_block():
  draw = np.random.default_rng(2)
  ratio = draw.uniform(-1, 1, SHAPE).astype(np.float32)
  first, second = SPREAD * ratio, np.square(SPREAD)
  found, values = eight_bits.unpack(*_pack(first, second))
  error = np.asarray(found - first) / np.sqrt(values)
  assert np.abs(error).max() < 1.2 / 126
  assert abs(error.mean()) < 2e-4


def test_no_gradients_make_an_update_beyond_adams_bound():
  # The worst that Cauchy-Schwarz allows grows by b2 / b1 a step.
  b1, b2 = 0.9, 0.95
  adam = moments.scale_by_adam(b1, b2, 1e-30, 'int8')

  def body(state, step):
    gradient = jnp.full(SHAPE, 1e-12) * (b2 / b1) ** step
    update, state = adam.update(gradient, state)
    return state, jnp.max(jnp.abs(update))

  state = adam.init(jnp.zeros(SHAPE))
  _, updates = jax.jit(
      lambda s: jax.lax.scan(body, s, jnp.arange(200.0))
  )(state)
  bound = eight_bits.largest_update(b1, b2)
  # Without the correction for the start, which is past by then.
  assert 0.9 * bound < updates[150:].max() < 1.01 * bound


def test_random_bits_are_uniform_and_differ_by_seed_and_index():
  bits = np.asarray(moments.random_bits((256, 512), jnp.uint32(3)))
  other = np.asarray(moments.random_bits((256, 512), jnp.uint32(4)))
  assert len(np.unique(bits)) > 0.999 * bits.size
  assert np.mean(bits == other) < 1e-4
  for part in (bits & 0xFFFF, bits >> 16):
    assert abs(part.mean() / 2**16 - 0.5) < 0.005
    assert abs(np.corrcoef(part[:, 1:].flat, part[:, :-1].flat)[0, 1]) < 0.01
  assert abs(np.corrcoef(bits.flat, other.flat)[0, 1]) < 0.01


@pytest.mark.parametrize('shape', [(640,), (3, 640), (3, 256, 20)])
def test_gains_and_what_has_no_whole_blocks_stay_float32(shape):
  ours = moments.scale_by_adam(0.9, 0.95, 1e-8, 'int8')
  plain = optax.scale_by_adam(0.9, 0.95, 1e-8)
  gradient = jnp.asarray(
      np.random.default_rng(3).standard_normal(shape, np.float32)
  )
  state = plain.init(gradient)
  jax.tree.map(np.testing.assert_array_equal, ours.init(gradient), state)
  expected, state = jax.jit(plain.update)(gradient, state)
  found, ours_state = jax.jit(ours.update)(gradient, ours.init(gradient))
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert jax.tree.structure(ours_state) == jax.tree.structure(state)


@pytest.mark.parametrize('kind, tolerance', [
    # Measured after two steps: 0.0016, 0.062.
    ('bfloat16', 0.003), ('int8', 0.08)
])
def test_a_large_leaf_is_updated_in_parts_as_a_small_one(kind, tolerance):
  # More than 2^22 weights are cut into parts.
  gradient = np.random.default_rng(4).standard_normal((3, 8192, 192))
  gradient = jnp.asarray(gradient, jnp.float32)
  adam = moments.scale_by_adam(0.9, 0.95, 1e-8, kind)
  plain = optax.scale_by_adam(0.9, 0.95, 1e-8)

  def second_update(adam):
    update = jax.jit(adam.update)
    _, state = update(gradient, adam.init(gradient))
    return update(0.5 * gradient, state)[0]

  error = second_update(adam) - (expected := second_update(plain))
  size = np.sqrt(np.mean(np.square(expected)))
  # In every part.
  by_row = np.sqrt(np.mean(np.square(error), axis=(0, 2)))
  assert 0 < by_row.min() and by_row.max() < tolerance * size


def test_a_large_leaf_is_updated_on_a_mesh_without_moving():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  placed = sharding.named(mesh, ('layers', 'mlp', 'embed'))
  shape = (3, 8192, 192)
  adam = moments.scale_by_adam(0.9, 0.95, 1e-8, 'int8')

  def on_mesh(x):
    where = sharding.of_statistics(placed, shape, x.shape)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  gradient = jax.ShapeDtypeStruct(shape, jnp.float32)
  state = jax.tree.map(on_mesh, jax.eval_shape(adam.init, gradient))
  program = jax.jit(adam.update).lower(on_mesh(gradient), state).compile()
  assert 'while(' in program.as_text()
  for collective in ('all-', 'collective-', 'reduce-scatter'):
    assert collective not in program.as_text()
  update, new = program.output_shardings
  assert update.is_equivalent_to(placed, 3)
  assert new.nu.scale.is_equivalent_to(placed, 3)
