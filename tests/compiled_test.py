"""What is read from a compiled program is what the program was made to do."""

import functools
import pathlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import compiled
from gemma_qat import hlo

SPEC = jax.sharding.PartitionSpec


def _mesh():
  return jax.make_mesh(
      (2, 4), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )


def _placed(mesh, shape, spec, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(
      shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
  )


def _compile(f, *arguments, **options):
  lowered = jax.jit(f, **options).lower(*arguments)
  return compiled.compile_to_ask(lowered)


def _mapped(f):
  """Compiles f of the [16, 8] float32 that each of eight devices holds."""
  mesh = _mesh()
  mapped = jax.shard_map(
      f, mesh=mesh, in_specs=SPEC(('a', 'b')), out_specs=SPEC(('a', 'b')),
      check_vma=False,
  )
  return _compile(mapped, _placed(mesh, (128, 8), SPEC(('a', 'b'))))


HELD = 16 * 8 * 4
# f: [16, 8] -> [16, 8], the kind it contains, whole and sent bytes a device.
KNOWN = {
    'all-reduce': (lambda x: lax.psum(x, 'b'), HELD, 2 * HELD * 3 / 4),
    'all-gather': (
        lambda x: lax.all_gather(x, 'b').sum(0), 4 * HELD, 4 * HELD * 3 / 4
    ),
    'reduce-scatter': (
        lambda x: jnp.tile(lax.psum_scatter(x, 'b', tiled=True), (4, 1)),
        HELD, HELD * 3 / 4,
    ),
    'all-to-all': (
        lambda x: lax.all_to_all(x, 'b', 0, 0, tiled=True), HELD, HELD * 3 / 4
    ),
    'collective-permute': (
        lambda x: lax.ppermute(x, 'a', [(0, 1), (1, 0)]), HELD, HELD
    ),
}


@pytest.mark.parametrize('kind', KNOWN)
def test_each_kind_is_counted_to_the_byte(kind):
  f, whole, sent = KNOWN[kind]
  found = compiled.read(_mapped(f).as_text())
  assert found.by_kind() == {kind: (1, whole, sent)}
  assert found.sent_bytes == sent
  assert {c.dtype for c in found.collectives} == {'f32'}


@pytest.mark.parametrize('kind', KNOWN)
def test_a_loop_multiplies_what_is_inside(kind):
  f, whole, sent = KNOWN[kind]
  def nested(x):
    inner = lambda y: lax.fori_loop(0, 3, lambda i, z: jnp.sin(f(z)), y)
    return lax.scan(lambda y, _: (inner(y), None), x, None, length=5)[0]
  found = compiled.read(_mapped(nested).as_text())
  assert found.by_kind() == {kind: (15, 15 * whole, 15 * sent)}
  assert not found.unknown_loops


def test_group_sizes_follow_the_axes():
  f = lambda x: lax.psum(jnp.sin(lax.psum(x, 'a')), ('a', 'b'))
  found = compiled.read(_mapped(f).as_text())
  assert sorted(c.group_size for c in found.collectives) == [2, 8]


def test_a_loop_of_unknown_length_is_named_and_counted_once():
  def f(x):
    body = lambda y: lax.psum(jnp.sin(y), 'b')
    return lax.while_loop(lambda y: jnp.sum(y) > 1, body, x)
  found = compiled.read(_mapped(f).as_text())
  assert len(found.unknown_loops) == 1
  assert found.by_kind()['all-reduce'] == (1, HELD, 2 * HELD * 3 / 4)


def test_weights_gathered_by_the_partitioner_are_counted():
  # Rows of a batch apart, weights apart too: FSDP in one product a layer.
  mesh = _mesh()
  weights = _placed(mesh, (6, 64, 64), SPEC(None, 'b'))
  x = _placed(mesh, (256, 64), SPEC(('a', 'b')))
  def f(w, x):
    def layer(x, w):
      whole = lax.with_sharding_constraint(
          w, jax.sharding.NamedSharding(mesh, SPEC())
      )
      return jnp.tanh(x @ whole), None
    return lax.scan(layer, x, w)[0]
  found = compiled.read(_compile(f, weights, x).as_text())
  layer = 64 * 64 * 4
  assert found.by_kind() == {
      'all-gather': (6, 6 * layer, 6 * layer * 3 / 4)
  }
  assert found.flops == 6 * 2 * 32 * 64 * 64


@pytest.mark.parametrize('equation, shapes, flops', [
    ('mk,kn->mn', ((8, 16), (16, 32)), 2 * 8 * 16 * 32),
    ('bmk,bkn->bmn', ((3, 8, 16), (3, 16, 32)), 2 * 3 * 8 * 16 * 32),
    ('nhd,bd->bnh', ((4, 8, 16), (5, 16)), 2 * 4 * 8 * 16 * 5),
    ('bnh,dnh->bd', ((5, 4, 8), (16, 4, 8)), 2 * 4 * 8 * 16 * 5),
])
def test_products_are_counted_inside_and_outside_of_loops(
    equation, shapes, flops
):
  arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  product = functools.partial(jnp.einsum, equation)
  once = _compile(product, *arrays)
  assert compiled.read(once.as_text()).flops == flops
  assert once.cost_analysis()['flops'] == flops
  def seven(x, y):
    # The product depends on the round, so that it stays inside.
    body = lambda i, out: out + product(x + i, y)
    return lax.fori_loop(0, 7, body, jnp.zeros(product_shape))
  product_shape = jax.eval_shape(product, *arrays).shape
  looped = _compile(seven, *arrays)
  assert compiled.read(looped.as_text()).flops == 7 * flops
  # Why this module counts for itself.
  assert looped.cost_analysis()['flops'] < 2 * flops + 1e5


@pytest.mark.parametrize('stride, padding', [
    (1, 'SAME'), (2, 'SAME'), (1, 'VALID'),
])
def test_convolutions_are_counted_as_the_compiler_counts_them(stride, padding):
  f = lambda x, w: lax.conv(x, w, (stride, 1), padding)
  found = _compile(
      f, jax.ShapeDtypeStruct((2, 3, 9, 11), jnp.float32),
      jax.ShapeDtypeStruct((5, 3, 3, 4), jnp.float32),
  )
  assert compiled.read(found.as_text()).flops == found.cost_analysis()['flops']


def test_gradients_cost_twice_the_forward_pass():
  shape = jax.ShapeDtypeStruct((32, 32), jnp.float32)
  f = lambda w, x: jnp.sum(jnp.sin(x @ w))
  once, both = (
      compiled.read(_compile(g, shape, shape).as_text()).flops
      for g in (f, jax.grad(f, (0, 1)))
  )
  assert once == 2 * 32**3
  assert both == 3 * once


def test_memory_traffic_counts_slices_by_what_they_take():
  layers, d, tokens = 16, 256, 8
  def f(x, w):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
  found = compiled.read(_compile(
      f, jax.ShapeDtypeStruct((tokens, d), jnp.float32),
      jax.ShapeDtypeStruct((layers, d, d), jnp.float32),
  ).as_text())
  weights = 4 * layers * d * d
  # A layer is read from the stack and perhaps copied on its way; reading the
  # whole stack in every round would be sixteen times as much.
  assert weights <= found.memory_bytes < 4 * weights


def test_memory_is_that_of_one_device_and_knows_donated_arguments():
  mesh = _mesh()
  x = _placed(mesh, (1024, 64), SPEC(('a', 'b')))
  held = compiled.memory(
      _compile(lambda x: x + 1, x, donate_argnums=0)
  )
  whole = 1024 * 64 * 4
  assert held.arguments == held.outputs == held.aliased == whole // 8
  kept = compiled.memory(_compile(lambda x: x + 1, x))
  assert kept.aliased == 0
  assert kept.total - kept.code == 2 * whole // 8 + kept.temporaries


def test_a_cpu_program_has_no_cycles():
  assert compiled.read(_mapped(jnp.sin).as_text()).cycles is None


# As a TPU's compiler writes: rounds only in the condition, a reduce-scatter as
# a fusion, gathers that are started and awaited, groups named by mesh axes.
TPU_PROGRAM = pathlib.Path(__file__).with_name('tpu_program.txt')


def test_the_text_of_a_tpu_program_is_understood():
  found = compiled.read(TPU_PROGRAM.read_text(encoding='utf-8'))
  assert not found.unknown_loops
  whole = 64 * 32 * 4
  gathered = 2 * 16 * 32 * 4
  assert found.by_kind() == {
      'reduce-scatter': (10, 10 * whole, 10 * whole * 3 / 4),
      'all-gather': (10, 10 * gathered, 10 * gathered / 2),
  }
  assert found.flops == 10 * 2 * 4 * 8 * 16 * 32
  assert found.cycles == 10 * 107


def test_an_operand_may_be_an_element_of_a_tuple():
  text = '''HloModule m, num_partitions=2

ENTRY %main (p: (s32[], f32[4,8], f32[8,2])) -> f32[4,2] {
  %p = (s32[], f32[4,8]{1,0}, f32[8,2]{1,0}) parameter(0)
  ROOT %d = f32[4,2]{1,0} dot(%p#1, %p#2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
'''
  program = hlo.parse(text)
  line = program.computations['main']['d']
  left, right = program.operands('main', line)
  assert left.opcode == 'get-tuple-element' and 'index=1' in left.rest
  assert (left.shape[0].sizes, right.shape[0].sizes) == ((4, 8), (8, 2))
  assert compiled.product_flops(program, 'main', line) == 2 * 4 * 8 * 2


def test_an_all_reduce_that_is_sliced_can_count_as_a_reduce_scatter():
  mesh = _mesh()
  def f(x, w):
    out = x @ w
    return lax.with_sharding_constraint(
        out, jax.sharding.NamedSharding(mesh, SPEC('b'))
    )
  text = _compile(
      f, _placed(mesh, (64, 32), SPEC(None, 'b')),
      _placed(mesh, (32, 16), SPEC('b')),
  ).as_text()
  whole = 64 * 16 * 4
  scattered = compiled.read(text, scattering=True).by_kind()
  assert scattered == {'reduce-scatter': (1, whole, whole * 3 / 4)}
  plain = compiled.read(text).by_kind()
  assert set(plain) <= {'all-reduce', 'reduce-scatter'}


def test_an_all_reduce_that_is_wanted_whole_stays_one():
  for f in (lambda x: lax.psum(x, 'b'), lambda x: jnp.sin(lax.psum(x, 'b'))):
    found = compiled.read(_mapped(f).as_text(), scattering=True)
    assert set(found.by_kind()) == {'all-reduce'}


def test_a_program_on_one_device_moves_nothing():
  found = compiled.read(
      _compile(jnp.sin, np.zeros((4, 4), np.float32)).as_text()
  )
  assert found.collectives == () and found.sent_bytes == 0


def test_memory_is_told_of_what_the_persistent_cache_holds_too():
  name = 'jax_persistent_cache_min_compile_time_secs'
  before = getattr(jax.config, name)
  shape = jax.ShapeDtypeStruct((256, 256), jnp.float32)
  lower = lambda: jax.jit(lambda x: jnp.tanh(x @ x) @ x).lower(shape)
  jax.config.update(name, 0)
  try:
    lower().compile()
    found = compiled.memory(compiled.compile_to_ask(lower()))
  finally:
    jax.config.update(name, before)
  assert found.temporaries >= 256 * 256 * 4
