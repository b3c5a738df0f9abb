"""Each distance is its definition, in pieces as at once, and has its gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from gemma_qat import distances
from gemma_qat import losses

T, D, V = 11, 6, 40


def _draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _inputs():
  labels = np.random.default_rng(5).integers(0, V, T)
  has_label = np.arange(T) % 4 > 0
  return (
      _draw(T, D), _draw(T, D, seed=1), _draw(V, D, seed=2),
      _draw(V, D, seed=3), labels, has_label,
  )


def _expected(name, inputs, temperature=1.0, k=5):
  """In float64, from the definition."""
  student, teacher, head, teacher_head, labels, has_label = inputs
  student, teacher = student.astype(np.float64), teacher.astype(np.float64)
  if name == 'hidden':
    return ((student - teacher) ** 2).sum(-1) / (teacher**2).sum(-1)
  s, t = student @ head.T, teacher @ teacher_head.T
  if name == 'cross_entropy':
    value = -special.log_softmax(s, -1)[np.arange(T), labels]
    return np.where(has_label, value, 0)
  q = special.softmax(s / temperature, -1)
  p = special.softmax(t / temperature, -1)
  kl = lambda p, q: special.rel_entr(p, q).sum(-1)
  if name == 'forward_kl':
    value = kl(p, q)
  elif name == 'reverse_kl':
    value = kl(q, p)
  elif name == 'jensen_shannon':
    value = (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
  else:
    kept = np.where(p >= np.sort(p, -1)[:, -k, None], p, 0)
    value = kl(kept / kept.sum(-1, keepdims=True), q)
  return temperature**2 * value


def _linear(options, inputs, size=None):
  return distances.linear(
      options, *inputs, dtype=jnp.float32, tokens_at_a_time=size
  )


@pytest.mark.parametrize('size', [None, 4])
@pytest.mark.parametrize('temperature', [1.0, 2.5])
@pytest.mark.parametrize('name', distances.NAMES)
def test_a_distance_is_its_definition(name, temperature, size):
  inputs = _inputs()
  options = distances.Options(((name, 3.0),), temperature, top_k=5)
  value, kl = jax.jit(lambda *a: _linear(options, a, size))(*inputs)
  np.testing.assert_allclose(
      value, 3 * _expected(name, inputs, temperature), rtol=2e-4, atol=2e-5
  )
  np.testing.assert_allclose(
      kl, _expected('forward_kl', inputs), rtol=2e-4, atol=2e-5
  )


@pytest.mark.parametrize('name', distances.NAMES)
def test_a_gradient_is_that_of_finite_differences(name):
  inputs = _inputs()
  options = distances.Options(((name, 1.0),), 1.5, top_k=5)
  weights = np.linspace(1, 2, T)
  total = lambda student: jnp.sum(
      _linear(options, (student, *inputs[1:]), 4)[0] * weights.astype(np.float32)
  )
  gradient = jax.jit(jax.grad(total))(inputs[0])
  direction = _draw(T, D, seed=9)
  step = 1e-4
  moved = [
      np.sum(weights * _expected(name, (
          inputs[0].astype(np.float64) + sign * step * direction, *inputs[1:]
      ), 1.5))
      for sign in (1, -1)
  ]
  slope = (moved[0] - moved[1]) / (2 * step)
  assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize('name', distances.NAMES)
def test_only_the_cross_entropy_is_not_least_at_the_teacher(name):
  _, teacher, _, head, labels, has_label = _inputs()
  options = distances.Options(((name, 1.0),), top_k=V)
  total = lambda student: jnp.sum(_linear(
      options, (student, teacher, head, head, labels, has_label)
  )[0])
  value, gradient = jax.value_and_grad(total)(teacher)
  is_least = abs(value) < 1e-4 and np.abs(gradient).max() < 1e-4
  assert is_least == (name != 'cross_entropy')


def test_few_entries_of_the_teacher_are_a_biased_target():
  _, teacher, _, head, labels, has_label = _inputs()
  options = distances.Options((('top_k', 1.0),), top_k=5)
  total = lambda student: jnp.sum(_linear(
      options, (student, teacher, head, head, labels, has_label)
  )[0])
  assert np.abs(jax.grad(total)(teacher)).max() > 1e-2


def test_terms_add_up_by_their_weights():
  inputs = _inputs()
  terms = (('forward_kl', 0.7), ('cross_entropy', 0.3))
  value, _ = _linear(distances.Options(terms), inputs)
  expected = sum(w * _expected(name, inputs) for name, w in terms)
  np.testing.assert_allclose(value, expected, rtol=2e-4, atol=2e-5)


def test_a_head_that_is_trained_gets_its_gradient():
  inputs = _inputs()
  options = distances.Options((('forward_kl', 1.0),))
  in_pieces = lambda head: jnp.sum(
      _linear(options, (*inputs[:2], head, *inputs[3:]), 3)[0]
  )
  whole = lambda head: jnp.sum(
      losses.kl_from_logits(inputs[0] @ head.T, inputs[1] @ inputs[3].T)
  )
  found, expected = (jax.grad(f)(inputs[2]) for f in (in_pieces, whole))
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_labels_are_the_next_tokens_of_the_text():
  tokens = np.array([[2, 10, 11, 2, 12, 0]])
  mask = np.array([[False, True, True, False, True, False]])
  labels, has_label = distances.next_tokens(tokens, mask)
  np.testing.assert_array_equal(has_label, [[1, 1, 0, 1, 0, 0]])
  np.testing.assert_array_equal(labels[has_label], [10, 11, 12])
