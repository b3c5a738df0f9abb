"""Whatever finds the codes of step 0, they are codes that a file can hold."""

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_model

from gemma_qat import errors
from gemma_qat.quant import gptq
from gemma_qat.quant import lattice
from gemma_qat.training import starts


@pytest.mark.parametrize('start', ['search', 'gptq'])
def test_starts_are_on_the_lattice_and_lose_less_of_the_layers_outputs(
    params, grams, student, start
):
  error = {}
  started = small_model.init_student(params, small_model.PLAN, start, grams)
  for name, tree in {start: started, 'reference': student}.items():
    error[name] = 0.0
    for path in (p for p in grams if p != 'embedding'):
      node, weight = (small_model.node(t, path) for t in (tree, params))
      codes, scale = np.asarray(node['codes']), np.asarray(node['scale'])
      assert codes.dtype == np.int8 and 0 <= codes.min() <= codes.max() <= 15
      np.testing.assert_array_equal(scale, scale.astype(np.float16))
      values = (codes - 8.0) * np.repeat(scale, 32, axis=-1)
      gram = grams[path].reshape(-1, *grams[path].shape[-2:])
      rows = (values - weight).reshape(len(gram), -1, gram.shape[-1])
      error[name] += np.einsum('gri,gij,grj->', rows, gram, rows)
  assert error[start] < error['reference']


def test_a_learned_start_rounds_to_the_codes_that_were_found(params, grams):
  plan = small_model.make_plan_of('learned')
  found = small_model.init_student(params, small_model.PLAN, 'search', grams)
  learned = small_model.init_student(params, plan, 'search', grams)
  for path in (p for p in grams if p != 'embedding'):
    expected = small_model.stored(found, path, small_model.PLAN[path])
    rounded = small_model.stored(learned, path, plan[path])
    np.testing.assert_array_equal(rounded.codes, expected.codes)
    np.testing.assert_array_equal(rounded.scale, expected.scale)


@pytest.mark.parametrize('start, mode', [
    ('reference', 'codes'), ('reference', 'learned'), ('reference', 'derived'),
    ('reference', 'fixed'), ('search', 'codes'), ('gptq', 'codes'),
    ('gptq', 'learned'), ('gptq', 'fixed'),
])
def test_bf16_safe_starts_have_such_scales_and_use_code_0(
    params, grams, start, mode
):
  plan = small_model.make_plan_of(mode, bf16_safe_scales=True)
  started = small_model.init_student(params, plan, start, grams)
  assert plan['embedding'][0].name == 'q8_0'
  for path in (p for p in grams if p != 'embedding'):
    codes, scale = small_model.stored(started, path, plan[path])
    scale = np.asarray(scale)
    np.testing.assert_array_equal(scale.astype(ml_dtypes.bfloat16), scale)
    np.testing.assert_array_equal(scale.astype(np.float16), scale)
    codes = np.asarray(codes).reshape(*scale.shape, 32)
    assert np.all(codes.min(-1) == 0) and codes.max() == 15


def test_a_start_with_scales_is_refused_for_derived_ones(params, grams):
  with pytest.raises(errors.UserError, match="start=gptq .*'derived'"):
    small_model.init_student(
        params, small_model.make_plan_of('derived'), 'gptq', grams
    )


def test_weights_that_are_not_finite_are_named(params):
  flat = small_model.flat(params)
  flat['groups/layer_0/mlp_up'] = np.full((2, 128, 64), np.nan)
  with pytest.raises(errors.UserError, match='groups/layer_0/mlp_up holds'):
    small_model.init_student(
        traverse_util.unflatten_dict(flat, sep='/'), small_model.PLAN
    )


@pytest.mark.parametrize('start', ['search', 'gptq'])
def test_an_embedding_of_four_bits_starts_by_what_the_head_reads(
    params, grams, start
):
  plan = small_model.make_plan(rules=((r'^embedding$', 'q4_0'),))
  entry, gram = plan['embedding'], grams['embedding']
  def lost(start):
    node = small_model.init_student(params, plan, start, grams)['embedding']
    weight = lattice.quantized(node, *entry)
    error = np.asarray(entry[0].dequantize(weight)) - params['embedding']
    return np.sum((error @ gram) * error)
  assert lost(start) < 0.95 * lost('reference')


def test_an_embedding_stays_nearer_than_rounding_for_the_head_leaves_it(
    params, grams
):
  plan = small_model.make_plan(rules=((r'^embedding$', 'q4_0'),))
  entry, table = plan['embedding'], params['embedding']
  far = lambda x: np.linalg.norm(np.asarray(entry[0].dequantize(x)) - table)
  node = small_model.init_student(params, plan, 'gptq', grams)['embedding']
  for_head = gptq.gptq_q4_0(table, np.asarray(grams['embedding']))
  assert far(lattice.quantized(node, *entry)) < 0.97 * far(for_head)


@pytest.mark.parametrize('mode', ['codes', 'learned', 'derived', 'fixed'])
def test_a_student_of_its_teacher_is_taken(params, mode):
  plan = small_model.make_plan_of(mode)
  starts.check_made(
      small_model.CONFIG, params, small_model.init_student(params, plan), plan,
      'reference',
  )


@pytest.mark.parametrize('path', [
    'groups/layer_0/mlp_up/codes', 'embedding/codes', 'final_norm',
])
def test_a_student_of_another_model_is_refused(params, student, path):
  flat = small_model.flat(student)
  flat[path] = np.asarray(flat[path])[::-1]
  weight = path.removesuffix('/codes').removesuffix('/scale')
  with pytest.raises(errors.UserError, match=f'begins with {weight} .* away'):
    starts.check_made(
        small_model.CONFIG, params, traverse_util.unflatten_dict(flat, sep='/'),
        small_model.PLAN, 'gptq',
    )


@pytest.mark.parametrize('mode', ['derived', 'learned', 'codes'])
def test_step_0_is_the_teacher_without_fake_quant_and_ptq_with_it(
    params, mode
):
  plan = small_model.make_plan_of(mode)
  student = small_model.init_student(params, plan)
  tokens = jnp.asarray(small_model.BATCH['tokens'][:2])
  apply = lambda model, tree: np.asarray(
      jax.jit(model.apply)({'params': tree}, tokens)
  )
  teacher = apply(small_model.make_model(), params)
  # PTQ as a file of it is read: codes and scales, dequantized.
  flat = small_model.flat(params)
  for path, entry in plan.items():
    quantize = jax.jit(entry[0].quantize, static_argnums=1)
    flat[path] = entry[0].dequantize(quantize(flat[path], entry[2]))
  ptq = apply(
      small_model.make_model(), traverse_util.unflatten_dict(flat, sep='/')
  )
  assert np.abs(ptq - teacher).max() > 0.01
  if mode == 'learned':
    # Masters round by the float16 scale, the reference by its float32.
    for path, entry in plan.items():
      ours = small_model.stored(student, path, entry).codes
      quantize = jax.jit(entry[0].quantize, static_argnums=1)
      theirs = quantize(small_model.node(params, path), entry[2]).codes
      steps = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
      assert steps.max() <= 1 and np.mean(steps) < 0.005
  else:
    quantized = apply(small_model.make_model(plan), student)
    np.testing.assert_allclose(quantized, ptq, rtol=1e-5, atol=1e-5)
  if mode == 'codes':
    return  # Nothing is left of the weights themselves.
  without = small_model.flat(student)
  for path in plan:
    if path + '/master' in without:
      without[path] = without[path + '/master']
      for part in ('/master', '/scale'):
        without.pop(path + part, None)
    elif path + '/codes' in without:
      without[path] = small_model.node(params, path)
      for part in ('/codes', '/scale'):
        without.pop(path + part)
  np.testing.assert_array_equal(
      apply(small_model.make_model(),
            traverse_util.unflatten_dict(without, sep='/')),
      teacher,
  )
