import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.quant import formats

_UNIFORM = [f.name for f in formats.FORMATS.values() if f.decode is None]
_UNIFORM.append('q4_0_bf16')


def _case(name, seed=0):
  format_ = formats.get(name)
  keys = jax.random.split(jax.random.key(seed), 3)
  master = jax.random.normal(keys[0], (4, 2, 64)) * 0.1
  scale = format_.quantize(master, 2).scale
  # Off the reference, of both signs, and small enough to clip now and then.
  factor = jax.random.uniform(keys[1], scale.shape, minval=0.6, maxval=1.1)
  gradient = jax.random.normal(keys[2], master.shape)
  return format_, master, -scale * factor, gradient


@pytest.mark.parametrize('name', _UNIFORM)
@pytest.mark.parametrize('jitted', [False, True])
def test_the_forward_value_is_what_the_codes_and_scales_say(name, jitted):
  format_, master, scale, _ = _case(name)
  f = format_.fake_quantize_learned
  value = (jax.jit(f) if jitted else f)(master, scale)
  stored = formats.Quantized(format_.codes_for(master, scale), scale)
  np.testing.assert_array_equal(value, format_.dequantize(stored))


@pytest.mark.parametrize('name', _UNIFORM)
def test_codes_are_the_nearest_of_the_lattice(name):
  format_, master, scale, _ = _case(name)
  at = lambda codes: format_.dequantize(formats.Quantized(codes, scale))
  codes = format_.codes_for(master, scale)
  distance = jnp.abs(at(codes) - master)
  for step in (-1, 1):
    other = jnp.clip(codes + step, format_.lowest, format_.highest)
    other = at(other.astype(jnp.int8))
    assert jnp.all(distance <= jnp.abs(other - master) + 1e-6)


def test_hand_computed_learned_scale_gradients():
  # d = 0.5: ratios 0.6, -2.4 inside; 20 and -9 clipped to levels 7 and -8.
  q4_0 = formats.get('q4_0')
  master = jnp.zeros((1, 32)).at[0, :4].set(jnp.float32([0.3, -1.2, 10, -4.5]))
  scale = jnp.full((1, 1), 0.5)
  g = jnp.zeros((1, 32)).at[0, :4].set(jnp.float32([1, 2, 3, 4]))
  loss = lambda m, s: jnp.vdot(q4_0.fake_quantize_learned(m, s), g)
  to_master, to_scale = jax.grad(loss, (0, 1))(master, scale)
  np.testing.assert_array_equal(to_master[0, :5], [1, 2, 0, 0, 0])
  # 1 * (1 - 0.6) + 2 * (-2 + 2.4) + 3 * 7 + 4 * -8
  np.testing.assert_allclose(to_scale, [[0.4 + 0.8 + 21 - 32]], rtol=1e-6)


@pytest.mark.parametrize('name', _UNIFORM)
def test_learned_gradients_equal_those_of_the_formula_with_rounding_ignored(
    name,
):
  format_, master, scale, g = _case(name)
  share = format_.block or master.shape[1] * master.shape[2]

  def formula(m, s):
    d = s + jax.lax.stop_gradient(format_.stored_scale(s) - s)
    d = jnp.repeat(d.reshape(-1), share).reshape(m.shape)
    ratio = m / d
    level = ratio + jax.lax.stop_gradient(jnp.round(ratio) - ratio)
    low, high = format_.lowest - format_.zero, format_.highest - format_.zero
    # Not clip alone: it halves the gradient on the edge.
    inside = (level >= low) & (level <= high)
    level = jnp.where(inside, level, jnp.clip(level, low, high))
    return jnp.vdot(d * level, g)

  learned = lambda m, s: jnp.vdot(format_.fake_quantize_learned(m, s), g)
  for ours, theirs in zip(
      jax.grad(learned, (0, 1))(master, scale),
      jax.grad(formula, (0, 1))(master, scale),
  ):
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('name', formats.FORMATS)
def test_with_frozen_codes_the_scale_gradient_is_the_finite_difference(name):
  format_ = formats.get(name)
  _, master, _, g = _case('q4_0')
  codes, scale = format_.quantize(master, 2)
  loss = lambda s: jnp.vdot(
      format_.dequantize(formats.Quantized(codes, s)), g
  )
  # Linear in the scale: doubling it is exact in float16, too.
  gradient = jax.grad(loss)(scale)
  for i in np.ndindex(*scale.shape):
    difference = loss(scale.at[i].multiply(2)) - loss(scale)
    np.testing.assert_allclose(
        gradient[i] * scale[i], difference, rtol=1e-3, atol=1e-4
    )


def test_a_scale_of_zero_gives_zeros_and_finite_gradients():
  q4_0 = formats.get('q4_0')
  master, scale = jnp.ones((1, 64)), jnp.float32([[0.0, 1e-9]])
  np.testing.assert_array_equal(q4_0.codes_for(master, scale), master * 8)
  value, pull = jax.vjp(q4_0.fake_quantize_learned, master, scale)
  np.testing.assert_array_equal(value, master * 0)
  assert all(jnp.all(jnp.isfinite(g)) for g in pull(master))


def test_a_format_with_unequal_steps_has_no_learned_scale():
  with pytest.raises(errors.UserError, match='sfp8'):
    formats.get('sfp8').codes_for(jnp.ones((1, 32)), jnp.ones((1, 1)))


def test_clipping_stops_gradients_beyond_the_outermost_code():
  q4_0 = formats.get('q4_0')
  # The scale is -10 / -8 = 1.25: codes reach from -10 to 8.75.
  weight = jnp.zeros((1, 32)).at[0, :4].set(jnp.array([-10.0, 9.9, 9.0, 3.0]))
  g = jnp.arange(1.0, 33.0)[None]
  gradient = lambda is_clipped: jax.grad(
      lambda w: jnp.vdot(q4_0.fake_quantize(w, 1, is_clipped), g)
  )(weight)
  np.testing.assert_array_equal(gradient(False), g)
  np.testing.assert_array_equal(gradient(True), g.at[0, 1].set(0))
  scale = jnp.full((1, 1), 1.0)
  of_master = lambda is_clipped: jax.grad(
      lambda m: jnp.vdot(q4_0.fake_quantize_learned(m, scale, is_clipped), g)
  )(weight)
  np.testing.assert_array_equal(of_master(False), g)
  np.testing.assert_array_equal(of_master(True), g.at[0, :3].set(0))
