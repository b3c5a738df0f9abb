"""Attention gathers what its definition says, for the price of its window."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import compiled
from gemma_qat import sharding
from gemma_qat.model import attention

OURS = ('mapped', 'blockwise')


def _normal(seed, *shape):
  # NumPy draws: each shape would cost JAX a compilation.
  draw = np.random.default_rng(seed).standard_normal(shape, np.float32)
  return jnp.asarray(draw)


def _inputs(length, n=4, k=2, h=16, batch=2):
  shape = lambda heads: (batch, length, heads, h)
  return (
      _normal(0, *shape(n)) / h**0.5, _normal(1, *shape(k)),
      _normal(2, *shape(k)),
  )


def _attend(window, implementation, dtype=jnp.float32):
  return lambda q, k, v: attention.attend(
      q, k, v, window, dtype, implementation
  )


def _materialised(window):
  """The definition, with all scores at once."""
  def attend(q, k, v):
    b, l, n, h = q.shape
    q = q.reshape(b, l, k.shape[2], n // k.shape[2], h)
    scores = jnp.einsum('blkgh,bskh->bkgls', q, k)
    distance = jnp.arange(l)[:, None] - jnp.arange(l)[None]
    seen = (distance >= 0) & (distance < (window or l))
    weights = jax.nn.softmax(
        jnp.where(seen[None, None, None], scores, -jnp.inf)
    )
    return jnp.einsum('bkgls,bskh->blkgh', weights, v).reshape(b, l, n, h)
  return attend


def _make_value_and_gradients(f, seed=99):
  """A function: f's output, and gradients of a random projection of it."""
  @jax.jit
  def run(q, k, v):
    def projected(q, k, v):
      out = f(q, k, v)
      return jnp.sum(out * _normal(seed, *out.shape)), out
    (_, out), gradients = jax.value_and_grad(
        projected, (0, 1, 2), has_aux=True
    )(q, k, v)
    return out, *gradients
  return run


@pytest.mark.parametrize('window, seen', [
    (None, [1, 2, 3, 4, 5]), (2, [1, 2, 2, 2, 2]), (1, [1, 1, 1, 1, 1]),
])
def test_a_query_sees_itself_and_the_window_before_it(window, seen):
  positions = jnp.arange(5)[None]
  mask = np.asarray(attention.visible(positions, positions, window))
  assert mask.shape == (1, 1, 5, 5)
  assert mask[0, 0].sum(axis=-1).tolist() == seen
  assert mask[0, 0].diagonal().all()
  assert not np.triu(mask[0, 0], 1).any()


# Shorter than a block and a window, or than neither; windows of one position,
# narrower and wider than a block; ragged ends of one row and of many; pieces
# of three blocks.
@pytest.mark.parametrize('implementation, length, window, n, k', [
    *(
        (implementation, *shapes) for implementation in OURS for shapes in [
            (24, None, 4, 2), (128, 1, 2, 2), (257, None, 4, 1),
            (300, 40, 4, 2), (700, 130, 4, 1),
        ]
    ),
    ('blockwise', 700, 600, 8, 2), ('blockwise', 2200, None, 4, 1),
    ('xla', 300, 40, 4, 2),
])
def test_values_and_gradients_are_those_of_the_definition(
    implementation, length, window, n, k
):
  qkv = _inputs(length, n, k, batch=1 if length > 300 else 2)
  found = _make_value_and_gradients(_attend(window, implementation))(*qkv)
  expected = _make_value_and_gradients(_materialised(window))(*qkv)
  for a, b in zip(found, expected):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('implementation', OURS)
def test_bfloat16_operands_cost_their_rounding_alone(implementation):
  qkv = [x.astype(jnp.bfloat16) for x in _inputs(200)]
  wide = [x.astype(jnp.float32) for x in qkv]
  f = _attend(90, implementation, jnp.bfloat16)
  out, *gradients = _make_value_and_gradients(f)(*qkv)
  expected = _make_value_and_gradients(_materialised(90))(*wide)
  assert out.dtype == jnp.float32
  assert {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}
  # bfloat16 has 8 bits: weights and scores' gradients lose 2^-9 each.
  for a, b in zip((out, *gradients), expected):
    error = np.asarray(a, np.float32) - np.asarray(b)
    assert np.sqrt(np.mean(error**2)) < 0.01 * np.std(b)
    assert np.abs(error).max() < 0.05 * np.abs(b).max()


@pytest.mark.parametrize('window', [None, 140])
@pytest.mark.parametrize('implementation', OURS)
def test_a_key_reaches_its_window_of_queries_and_no_other(
    implementation, window
):
  q, k, v = _inputs(420, batch=1)
  attend = jax.jit(_attend(window, implementation))
  before = np.asarray(attend(q, k, v))
  # On both sides of the edges of blocks, and in the ragged end.
  for position in (0, 100, 127, 128, 255, 256, 383, 384, 419):
    change = lambda x, p=position: x.at[:, p].add(1.0)
    after = np.asarray(attend(q, change(k), change(v)))
    changed = (after != before).any(axis=(0, 2, 3))
    stop = min(position + (window or 420), 420)
    expected = (np.arange(420) >= position) & (np.arange(420) < stop)
    np.testing.assert_array_equal(changed, expected, str(position))


@pytest.mark.parametrize('window', [None, 140])
@pytest.mark.parametrize('implementation', OURS)
def test_a_query_has_gradients_in_its_window_alone(implementation, window):
  qkv = _inputs(420, batch=1)
  @jax.jit
  def gradients(position, q, k, v):
    one = lambda q, k, v: jnp.sum(_attend(window, implementation)(q, k, v)[
        :, position
    ])
    return jax.grad(one, (0, 1, 2))(q, k, v)
  for position in (127, 128, 300, 419):
    dq, dk, dv = gradients(position, *qkv)
    touched = lambda x: np.asarray(x).any(axis=(0, 2, 3)).nonzero()[0].tolist()
    seen = list(range(max(position + 1 - (window or 420), 0), position + 1))
    assert touched(dq) == [position]
    assert touched(dk) == touched(dv) == seen


@pytest.mark.parametrize('implementation', OURS)
def test_gradients_are_the_same_rematerialised_inside_a_scan(implementation):
  q, k, v = _inputs(200, batch=1)
  def stacked(remat):
    def layers(q, k, v):
      block = remat(lambda x: x + _attend(90, implementation)(x, k, v))
      out, _ = jax.lax.scan(lambda x, _: (block(x), None), q, length=3)
      return out
    return _make_value_and_gradients(layers)(q, k, v)
  found = stacked(_keeping_products)
  for a, b in zip(found, stacked(lambda f: f)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def _keeping_products(f):
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return jax.checkpoint(f, policy=policy)


def _abstract(length, n=4, k=1, h=16):
  shape = lambda heads: jax.ShapeDtypeStruct(
      (1, length, heads, h), jnp.float32
  )
  return shape(n), shape(k), shape(k)


def _temporary_bytes(f, length):
  total = lambda q, k, v: jnp.sum(jnp.square(f(q, k, v)))
  step = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
  program = compiled.compile_to_ask(step.lower(*_abstract(length)))
  return compiled.memory(program).temporaries


def _product_flops(jaxpr):
  """Multiplications and additions of matrix products, loops counted out."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      shape = equation.invars[0].aval.shape
      size = math.prod(shape[axis] for axis in contracted)
      total += 2 * size * math.prod(equation.outvars[0].aval.shape)
    turns = equation.params.get('length', 1)
    for inner in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        total += turns * _product_flops(inner)
  return total


def _flops(f, length):
  total = lambda q, k, v: jnp.sum(jnp.square(f(q, k, v)))
  step = jax.make_jaxpr(jax.value_and_grad(total, (0, 1, 2)))
  return _product_flops(step(*_abstract(length)).jaxpr)


@pytest.mark.parametrize('implementation', OURS)
def test_the_products_of_a_local_layer_grow_with_the_length_alone(
    implementation
):
  window, n, h = 256, 4, 16
  f = _attend(window, implementation)
  flops = {length: _flops(f, length) for length in (1024, 2048, 4096)}
  assert flops[4096] - flops[2048] == 2 * (flops[2048] - flops[1024])
  # Two products forward, five backward (one of them the scores again), over a
  # block (128) more than the window.
  a_position = 7 * 2 * n * h * (window + 128)
  assert 0.9 * 4096 * a_position < flops[4096] <= 4096 * a_position
  full = _flops(_attend(window, 'xla'), 4096)
  assert flops[4096] < full / 5


@pytest.mark.parametrize('implementation', OURS)
def test_the_products_of_a_global_layer_are_little_more_than_half(
    implementation
):
  whole = 7 * 2 * 4 * 16 * 4096**2
  assert whole / 2 < _flops(_attend(None, implementation), 4096) < 0.6 * whole


@pytest.mark.parametrize('window', [None, 256])
@pytest.mark.parametrize('implementation', OURS)
def test_compiled_memory_grows_with_the_length_alone(implementation, window):
  f = _attend(window, implementation)
  small, large = _temporary_bytes(f, 2048), _temporary_bytes(f, 4096)
  # Scores of a block and arrays like q, k and v. All scores grow fourfold.
  assert large < 2.7 * small
  assert large < _temporary_bytes(_attend(window, 'xla'), 4096) / 5


def test_a_policy_that_keeps_matrix_products_keeps_no_scores():
  f = _keeping_products(_attend(None, 'mapped'))
  scores = 4 * 4 * 4096**2
  assert _temporary_bytes(f, 4096) < scores / 2


@pytest.mark.parametrize('window', [None, 140])
def test_blockwise_attention_cut_over_devices_moves_nothing(window):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  qkv = _inputs(420, n=4, k=2, batch=4)
  spread = [
      jax.device_put(x, sharding.named(mesh, ('batch', None, 'heads', None)))
      for x in qkv
  ]
  run = _make_value_and_gradients(_attend(window, 'blockwise'))
  found = run(*spread)
  expected = _make_value_and_gradients(_materialised(window))(*qkv)
  for a, b in zip(found, expected):
    assert {s.data.shape for s in a.addressable_shards} == {
        (1, 420, b.shape[2] // 2, b.shape[3])
    }
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
  program = run.lower(*spread).compile().as_text()
  assert 'while' in program
  for collective in ('all-gather', 'all-reduce', 'all-to-all',
                     'collective-permute'):
    assert collective not in program, collective


@pytest.mark.skipif(jax.default_backend() == 'gpu', reason='needs no GPU')
def test_without_a_gpu_cudnn_says_why_not():
  assert attention.why_not_cudnn(4, 1, 256, 16, 'bfloat16')


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs a GPU')
@pytest.mark.parametrize('window', [None, 128, 512])
@pytest.mark.parametrize('n, k, h', [(4, 1, 256), (8, 4, 256), (32, 16, 128)])
def test_cudnn_values_and_gradients_are_those_of_the_definition(
    n, k, h, window
):
  obstacle = attention.why_not_cudnn(n, k, h, window or 512, 'bfloat16')
  if obstacle is not None:
    pytest.skip(obstacle)
  qkv = [
      x.astype(jnp.bfloat16).astype(jnp.float32)
      for x in _inputs(640, n, k, h, batch=1)
  ]
  f = _attend(window, 'cudnn', jnp.bfloat16)
  found = _make_value_and_gradients(f)(*qkv)
  expected = _make_value_and_gradients(_materialised(window))(*qkv)
  for a, b in zip(found, expected):
    error = np.asarray(a) - np.asarray(b)
    assert np.sqrt(np.mean(error**2)) < 0.02 * np.std(b)


def test_attention_over_a_cache_is_that_of_the_whole_sequence():
  q, k, v = _inputs(40)
  positions = jnp.broadcast_to(jnp.arange(40), (2, 40))
  mask = attention.visible(positions, positions, 7)
  found = attention.attend_cached(q, k, v, mask, jnp.float32)
  expected = _attend(7, 'blockwise')(q, k, v)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
