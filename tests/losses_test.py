"""The KL in one pass over the vocabulary is the plain KL, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import compiled
from gemma_qat import heads
from gemma_qat import losses

T, D, V = 13, 24, 640


def _inputs(tokens=T, width=D, vocabulary=V, teacher_width=None):
  """Hidden states and heads with logits of spread 3."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape, np.float32)
  teacher_width = teacher_width or width
  return (
      draw(tokens, width), draw(tokens, teacher_width),
      draw(vocabulary, width) * np.float32(3 * width**-0.5),
      draw(vocabulary, teacher_width) * np.float32(3 * teacher_width**-0.5),
  )


def _plain(student, teacher, head, teacher_head):
  return losses.kl_from_logits(student @ head.T, teacher @ teacher_head.T)


def _blocked(block=100, dtype=jnp.float32, train_head=False):
  return functools.partial(
      losses.linear_kl, block=block, dtype=dtype, train_head=train_head
  )


def _value_and_gradients(f, args):
  """Values [T] and the gradients of their weighted sum."""
  weights = np.linspace(-1, 2, len(args[0]), dtype=np.float32)

  @jax.jit
  def run(args):
    def total(args):
      values = f(*args)
      return jnp.sum(values * weights), values
    return jax.value_and_grad(total, has_aux=True)(args)

  (_, values), gradients = jax.device_get(run(args))
  return values, gradients


@pytest.fixture(scope='module')
def plain():
  return _value_and_gradients(_plain, _inputs())


def test_kl_from_logits_is_the_definition():
  rng = np.random.default_rng(0)
  student, teacher = rng.standard_normal((2, 5, 30)) * 4
  softmax = lambda x: np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)
  p, q = softmax(teacher), softmax(student)
  np.testing.assert_allclose(
      losses.kl_from_logits(jnp.float32(student), jnp.float32(teacher)),
      np.sum(p * np.log(p / q), axis=-1), rtol=1e-4,
  )


# 640 words: in blocks that do and do not divide, and all at once.
@pytest.mark.parametrize('block', [7, 128, 639, 640, 1000])
@pytest.mark.parametrize('train_head', [False, True])
def test_values_and_gradients_are_those_of_materialised_logits(
    plain, block, train_head
):
  values, gradients = _value_and_gradients(
      _blocked(block, train_head=train_head), _inputs()
  )
  expected, (student, _, head, _) = plain
  np.testing.assert_allclose(values, expected, atol=1e-5)
  np.testing.assert_allclose(gradients[0], student, atol=1e-5)
  if train_head:
    np.testing.assert_allclose(gradients[2], head, atol=1e-5)
  else:
    assert not gradients[2].any()
  assert not gradients[1].any() and not gradients[3].any()


def test_in_less_room_there_are_more_rounds_and_the_same_values():
  args = _inputs(tokens=300)
  expected, gradients = _value_and_gradients(_plain, args)
  # For 128 tokens: rounds of 128, 128 and 44.
  room = 128 * 2 * V * 4
  assert losses.choose_tokens(300, V, jnp.float32, room) == 128
  assert losses.choose_tokens(300, V, jnp.float32) == 300
  values, found = _value_and_gradients(
      functools.partial(losses.linear_kl, room=room, dtype=jnp.float32), args
  )
  np.testing.assert_allclose(values, expected, atol=1e-5)
  np.testing.assert_allclose(found[0], gradients[0], atol=1e-5)


def test_gradients_are_finite_differences():
  args = _inputs()
  run = jax.jit(lambda *a: jnp.sum(_blocked(train_head=True)(*a)))
  gradients = jax.jit(jax.grad(run, argnums=(0, 2)))(*args)
  rng = np.random.default_rng(1)
  for i, gradient in zip((0, 2), gradients):
    direction = rng.standard_normal(args[i].shape, np.float32)
    at = lambda e: float(run(
        *args[:i], args[i] + np.float32(e) * direction, *args[i + 1 :]
    ))
    slope = (at(1e-3) - at(-1e-3)) / 2e-3
    assert slope == pytest.approx(float(np.vdot(gradient, direction)), rel=2e-2)


def test_the_whole_vocabulary_of_gemma_is_summed_exactly():
  args = _inputs(tokens=6, width=16, vocabulary=262_144)
  blocked = jax.jit(_blocked(block=5000))(*args)
  student, teacher, head, teacher_head = (x.astype(np.float64) for x in args)
  log_softmax = lambda x: x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
  log_p = log_softmax(teacher @ teacher_head.T)
  log_q = log_softmax(student @ head.T)
  expected = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
  # KL of 6 to 10 nats; measured: 2e-7 of it.
  np.testing.assert_allclose(blocked, expected, rtol=1e-5)


def test_student_and_teacher_may_differ_in_width():
  args = _inputs(teacher_width=40)
  np.testing.assert_allclose(
      _blocked()(*args), _plain(*args), rtol=1e-5, atol=1e-5
  )


def test_equal_models_have_no_divergence_and_no_gradient():
  student, _, head, _ = _inputs()
  values, gradients = _value_and_gradients(
      lambda s, h: _blocked(train_head=True)(s, student, h, head),
      (student, head),
  )
  assert np.abs(values).max() < 1e-5
  assert max(np.abs(g).max() for g in gradients) < 1e-5


def test_bfloat16_operands_stay_near_float32(plain):
  values, gradients = _value_and_gradients(
      _blocked(dtype=jnp.bfloat16, train_head=True), _inputs()
  )
  expected, (student, _, head, _) = plain
  assert values.dtype == gradients[0].dtype == np.float32
  # Eight bits of mantissa; measured: 0.2 % of the KL, 0.5 % of gradients.
  np.testing.assert_allclose(values, expected, rtol=0.01)
  for found, exact in [(gradients[0], student), (gradients[2], head)]:
    assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)


def test_bfloat16_gradients_of_small_divergences_are_not_lost_in_rounding():
  student, _, head, _ = _inputs()
  noise = np.random.default_rng(2).standard_normal(student.shape, np.float32)
  # Both sides' operands are bfloat16 values, so that only the rounding of
  # probabilities tells the two computations apart.
  rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
  args = rounded(student), rounded(student + 0.05 * noise), rounded(head)
  args += (args[2],)
  expected, exact = _value_and_gradients(_plain, args)
  values, found = _value_and_gradients(_blocked(dtype=jnp.bfloat16), args)
  # Measured at 0.01 nats: 0.7 % of the gradient.
  np.testing.assert_allclose(values, expected, atol=1e-5)
  assert np.linalg.norm(found[0] - exact[0]) < 0.05 * np.linalg.norm(exact[0])


def test_extreme_logits_give_finite_values_and_gradients():
  student, teacher, head, teacher_head = _inputs()
  values, gradients = _value_and_gradients(
      _blocked(train_head=True),
      (1e4 * student, -1e4 * teacher, head, teacher_head),
  )
  assert np.isfinite(values).all() and values.min() > 1e3
  assert all(np.isfinite(g).all() for g in gradients)


def test_masked_mean_counts_what_the_mask_lets_through():
  values = jnp.array([[1.0, 5.0], [3.0, 100.0]])
  mask = jnp.array([[True, False], [True, False]])
  assert losses.masked_mean(values, mask) == 2.0
  assert losses.masked_mean(values, jnp.zeros_like(mask)) == 0.0
  gradient = jax.grad(losses.masked_mean)(values, mask)
  np.testing.assert_array_equal(gradient, [[0.5, 0], [0.5, 0]])


@pytest.mark.parametrize('train_head', [False, True])
def test_compiled_memory_is_bounded_whatever_the_logits_take(train_head):
  def temporary_bytes(f):
    total = lambda *args: jnp.sum(f(*args))
    gradient = jax.grad(total, argnums=(0, 2) if train_head else 0)
    shapes = [
        jax.ShapeDtypeStruct(s, jnp.float32)
        for s in 2 * [(8192, 32)] + 2 * [(262_144, 32)]
    ]
    program = compiled.compile_to_ask(jax.jit(gradient).lower(*shapes))
    return compiled.memory(program).temporaries

  # One array of logits is 8.6 GB; exponentials of 1,024 tokens are 2 GiB.
  assert temporary_bytes(_blocked(1024, train_head=train_head)) < 2.5e9
  assert temporary_bytes(_plain) > 8e9


def _quantized_head(head):
  """A head as codes and scales of 8 columns, and what makes rows of them."""
  cut = head.reshape(len(head), -1, 8)
  scale = np.abs(cut).max(-1) / np.float32(7)
  codes = np.round(cut / scale[..., None]).astype(np.int8)

  def rows(node):
    levels = node['codes'].reshape(*node['scale'].shape, 8)
    return (levels * node['scale'][..., None]).reshape(node['codes'].shape)

  return {'codes': codes.reshape(head.shape), 'scale': scale}, rows


@pytest.mark.parametrize('sizes', [
    None, (8, 1, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8), (1, 8, 1),
], ids=str)
@pytest.mark.parametrize('train_head', [False, True])
@pytest.mark.parametrize('is_quantized', [False, True])
def test_on_any_mesh_values_and_gradients_are_the_same(
    sizes, train_head, is_quantized
):
  student, teacher, head, teacher_head = _inputs(tokens=16, width=64)
  node, rows = _quantized_head(head) if is_quantized else (head, losses.as_it_is)
  weights = np.linspace(-1, 2, len(student), dtype=np.float32)
  placement = None
  if sizes:
    mesh = jax.make_mesh(
        sizes, ('data', 'fsdp', 'tensor'),
        axis_types=3 * (jax.sharding.AxisType.Auto,),
    )
    placement = heads.Placement(mesh, ('data', 'fsdp'), 'tensor', 'fsdp')

  def loss(kl, student, node):
    if is_quantized:
      node = dict(node, codes=_quantized_head(head)[0]['codes'])
    values = kl(student, teacher, node, teacher_head)
    return jnp.sum(values * weights), values

  ours = functools.partial(
      losses.linear_kl, rows=rows, block=50, dtype=jnp.float32,
      train_head=train_head, placement=placement,
  )
  plain = lambda s, t, node, u: losses.kl_from_logits(
      s @ rows(node if train_head else jax.lax.stop_gradient(node)).T, t @ u.T
  )
  if is_quantized:
    node = {'scale': node['scale']}
  run = lambda kl: jax.jit(
      jax.grad(functools.partial(loss, kl), (0, 1), has_aux=True)
  )(student, node)
  found, expected = run(ours), run(plain)
  for x, y in zip(
      jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(x, y, atol=3e-5 * max(1, np.abs(y).max()))


def test_a_mesh_gathers_a_head_block_by_block_and_sums_once():
  mesh = jax.make_mesh(
      (1, 2, 4), ('data', 'fsdp', 'tensor'),
      axis_types=3 * (jax.sharding.AxisType.Auto,),
  )
  placement = heads.Placement(mesh, ('data', 'fsdp'), 'tensor', 'fsdp')
  where = lambda *axes: jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*axes)
  )
  hidden, head = where(('data', 'fsdp'), None), where('tensor', 'fsdp')
  shape = lambda sharding, *s: jax.ShapeDtypeStruct(
      s, jnp.float32, sharding=sharding
  )
  kl = functools.partial(
      losses.linear_kl, block=128, dtype=jnp.float32, placement=placement
  )
  program = jax.jit(jax.grad(lambda *a: jnp.sum(kl(*a)))).lower(
      shape(hidden, 64, 32), shape(hidden, 64, 32),
      shape(head, 4096, 32), shape(head, 4096, 32),
  ).compile()
  moved = compiled.read(program.as_text()).collectives
  gathers = [c for c in moved if c.kind == 'all-gather']
  # A device's 1,024 words in 8 blocks of 128; both heads, the student's twice.
  assert {c.whole_bytes for c in gathers} == {128 * 32 * 4}
  assert sum(c.times for c in gathers) == 3 * 8
  # The slope [32, 32] is summed over the devices once.
  slopes = [c for c in moved if c.kind == 'all-reduce' and c.whole_bytes == 4096]
  assert [c.times for c in slopes] == [1]
