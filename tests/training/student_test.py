"""The student is a point of the lattice, in training as in its file."""

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model

from gemma_qat import errors
from gemma_qat import losses
from gemma_qat import sharding
from gemma_qat.quant import low_rank
from gemma_qat.training import student as student_lib

TOKENS = small_model.BATCH['tokens']
PLAN = small_model.PLAN
TRAIN = (
    (r'^embedding', None), (r'/scale$', 'scales'), (r'norm$', 'norms'),
)


def _hidden(model, tree):
  return np.asarray(
      jax.jit(lambda p: model.apply({'params': p}, TOKENS))(tree)
  )


@pytest.fixture(scope='module')
def run_plain():
  """The network without an intercept, compiled once."""
  model = small_model.make_model()
  return jax.jit(lambda p: model.apply({'params': p}, TOKENS))


@pytest.fixture(scope='module')
def teacher_hidden(params, run_plain):
  return np.asarray(run_plain(params))


# What a plan refuses.


def test_a_plan_gives_matrices_their_format_and_mode():
  plan = small_model.make_plan(
      ((r'attn_[kv]$', None), (r'attn_o$', 'q8_0'), *small_model.RULES),
      ((r'attn_o$', 'codes'), (r'mlp', 'derived'), (r'.', 'learned')),
  )
  assert len(plan) == 5 + 1
  named = {p: (f.name, mode, n) for p, (f, mode, n) in plan.items()}
  assert named['groups/layer_0/attn_o'] == ('q8_0', 'codes', 2)
  assert named['groups/layer_0/mlp_up'] == ('q4_0', 'derived', 1)
  assert named['groups/layer_0/attn_q'] == ('q4_0', 'learned', 1)


def test_a_format_rule_that_fits_nothing_is_refused():
  with pytest.raises(errors.UserError, match="'atn_q' fits no weight"):
    small_model.make_plan(((r'atn_q', 'q4_0'), *small_model.RULES))


def test_a_format_for_gains_is_refused():
  with pytest.raises(errors.UserError, match='norm.*vector of gains'):
    small_model.make_plan(((r'.', 'q4_0'),))


def test_a_weight_without_a_mode_is_refused():
  with pytest.raises(errors.UserError, match='modes says nothing of embedding'):
    small_model.make_plan(modes=((r'attn', 'codes'),))


# Who is trained.


def test_groups_are_those_of_the_first_rule_that_fits(student):
  groups = student_lib.groups(student, TRAIN)
  assert groups['groups/layer_0/attn_q/scale'] == 'scales'
  assert groups['final_norm'] == groups['groups/layer_0/attn_q_norm'] == 'norms'
  assert not any(p.startswith('embedding') or 'codes' in p for p in groups)


def test_a_training_rule_that_fits_nothing_is_refused(student):
  with pytest.raises(errors.UserError, match="'/master\\$' fits no weight"):
    student_lib.groups(student, (*TRAIN, (r'/master$', 'weights')))


def test_training_codes_is_refused(student):
  with pytest.raises(errors.UserError, match='trains .*/codes.*no gradient'):
    student_lib.groups(student, ((r'attn_q', 'weights'),))


def test_training_nothing_is_refused(student):
  with pytest.raises(errors.UserError, match='trains nothing'):
    student_lib.groups(student, ((r'.', None),))


def test_join_undoes_split(student):
  groups = student_lib.groups(student, TRAIN)
  trained, frozen = student_lib.split(student, groups)
  assert set(trained) == set(groups) and not set(trained) & set(frozen)
  joined = small_model.flat(student_lib.join(trained, frozen))
  assert joined.keys() == small_model.flat(student).keys()
  for path, leaf in small_model.flat(student).items():
    assert joined[path] is leaf


@pytest.mark.parametrize(
    'mode', ['derived', 'learned', 'codes', 'fixed', 'lora4']
)
def test_the_outline_has_the_leaves_of_the_student(params, mode):
  plan = small_model.make_plan_of(mode)
  student = small_model.init_student(params, plan)
  outline = student_lib.outline(small_model.CONFIG, plan)
  assert small_model.flat(outline).keys() == small_model.flat(student).keys()


# What the student computes.


@pytest.mark.parametrize(
    'mode', ['derived', 'learned', 'codes', 'fixed', 'lora4']
)
def test_training_computes_with_the_numbers_that_a_file_gets(
    params, run_plain, teacher_hidden, mode
):
  plan = small_model.make_plan_of(mode)
  student = small_model.init_student(params, plan)
  # A factor that begins as zeros would say nothing.
  student = jax.tree_util.tree_map_with_path(
      lambda path, x: x + 0.01 if path[-1].key == 'lora_b' else x, student
  )
  in_training = _hidden(small_model.make_model(plan), student)
  exported = small_model.flat(student)
  for path, entry in plan.items():
    stored = small_model.stored(student, path, entry)
    for part in ('codes', *low_rank.PARTS):
      exported.pop(f'{path}/{part}', None)
    codes = np.asarray(stored.codes, np.float32) - entry[0].zero
    exported[path] = codes * np.repeat(stored.scale, 32, axis=-1)
  exported = traverse_util.unflatten_dict(exported, sep='/')
  np.testing.assert_array_equal(in_training, run_plain(exported))
  assert np.abs(in_training - teacher_hidden).max() > 0.01


def test_fewer_bits_are_further_from_the_teacher(params, teacher_hidden):
  head = params['embedding'].T
  distance = {}
  for name in ('q4_0', 'q8_0'):
    plan = small_model.make_plan(((small_model.MATRICES, name),))
    student = small_model.init_student(params, plan)
    hidden = _hidden(small_model.make_model(plan), student)
    distance[name] = float(np.mean(
        losses.kl_from_logits(hidden @ head, teacher_hidden @ head)
    ))
  assert 0 < 20 * distance['q8_0'] < distance['q4_0'] < 1


def test_settling_frozen_nodes_keeps_the_function_bit_for_bit(student):
  trained, frozen = student_lib.split(student, student_lib.groups(
      student, ((r'/mlp_.*/scale$', 'scales'),)
  ))
  settled, plan = student_lib.settle(frozen, PLAN)
  # Nodes whose scale is trained stay; of the others only values do.
  assert {path for path, entry in plan.items() if entry[1] == 'codes'} == {
      path for path in PLAN if '/mlp_' in path
  }
  assert not any(p.endswith('/scale') for p in settled)
  np.testing.assert_array_equal(
      _hidden(small_model.make_model(plan),
              student_lib.join(trained, settled)),
      _hidden(small_model.make_model(PLAN), student),
  )


def test_gradients_of_frozen_codes_scales_are_finite_differences(student):
  trained, frozen = student_lib.split(
      student, student_lib.groups(student, TRAIN[:2])
  )
  model = small_model.make_model(PLAN)
  target = np.random.default_rng(1).standard_normal(
      (*TOKENS.shape, small_model.CONFIG.embed_dim)
  ).astype(np.float32)

  @jax.jit
  def value_and_gradient(trained):
    def value(trained):
      tree = student_lib.join(trained, frozen)
      return jnp.mean(model.apply({'params': tree}, TOKENS) * target)
    return jax.value_and_grad(value)(trained)

  # The forward pass rounds scales to float16, so the ends of the difference
  # have to be float16 values; 0.5 % is ten steps of them.
  rng = np.random.default_rng(2)
  def ends(scale):
    change = scale * np.float32(0.005) * rng.choice([-1, 1], scale.shape)
    to_float16 = lambda x: np.float32(np.float16(x))
    return to_float16(scale - change), to_float16(scale + change)
  pairs = {path: ends(np.asarray(x)) for path, x in trained.items()}
  low, high = ({p: pair[i] for p, pair in pairs.items()} for i in (0, 1))
  gradient = jax.device_get(value_and_gradient(trained)[1])
  predicted = sum(np.vdot(gradient[p], high[p] - low[p]) for p in trained)
  measured = value_and_gradient(high)[0] - value_and_gradient(low)[0]
  assert float(measured) == pytest.approx(float(predicted), rel=0.005)


# Where its leaves lie.


def test_codes_and_scales_are_cut_as_their_weight_is(student):
  student = small_model.flat(student)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  placed = student_lib.shardings(mesh, small_model.CONFIG, student)
  assert placed.keys() == student.keys()
  shard = lambda path: placed[path].shard_shape(student[path].shape)
  assert shard('embedding/codes') == (64, 32)
  assert shard('groups/layer_0/mlp_up/scale') == (2, 64, 1)
  assert shard('groups/layer_0/attn_q/scale') == (2, 2, 32, 1)


def test_a_mesh_that_would_cut_blocks_is_refused_with_the_leafs_name(student):
  student = small_model.flat(student)
  mesh = sharding.make_mesh(data=2, fsdp=4)
  with pytest.raises(errors.UserError, match="/(codes|scale): axis 'embed'"):
    student_lib.shardings(mesh, small_model.CONFIG, student)
