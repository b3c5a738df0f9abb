"""A step that training saved with Orbax v1 becomes the same weights."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest
import tensorstore as ts

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import orbax_arrays
from gemma_qat.checkpoints import orbax_files
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import formats
from gemma_qat.quant import lattice

MODES = {
    'attn_q': 'codes', 'attn_o': 'learned', 'mlp_up': 'derived',
    'mlp_gate': 'fixed', 'mlp_down': 'lora4',
}


@pytest.fixture(scope='module')
def plan(tiny):
  """Every mode once, in groups and tail; the embedding in Q8_0."""
  specs = model_weights.tree_specs(tiny.config)
  entries = {
      path: lattice.Entry(
          formats.get('q4_0'), MODES[path.split('/')[-1]], spec.contraction
      )
      for path, spec in specs.items() if path.split('/')[-1] in MODES
  }
  entries['embedding'] = lattice.Entry(formats.get('q8_0'), 'codes', 1)
  return entries


@pytest.fixture(scope='module')
def student(tiny, plan):
  tree = model_weights.stack(tiny.config, dict(tiny.weights))
  return jax.tree_util.tree_map_with_path(
      lambda path, w: _node(plan, '/'.join(k.key for k in path), w), tree
  )


@pytest.fixture(scope='module')
def workdir(tiny, plan, student, tmp_path_factory):
  """Saved as the training loop saves: asynchronously, the last two kept."""
  workdir = tmp_path_factory.mktemp('run')
  policies = ocp.training.save_decision_policies
  keep = ocp.training.preservation_policies
  with ocp.training.Checkpointer(
      workdir / 'checkpoints',
      context=orbax_files.context(),
      save_decision_policy=policies.FixedIntervalPolicy(5),
      preservation_policy=keep.LatestN(2),
  ) as checkpointer:
    for step in range(16):
      checkpointer.save_checkpointables_async(step, {
          'student': student,
          'manifest': orbax_files.manifest(tiny.config, plan, step, 'test'),
          'tokenizer': orbax_files.tokenizer_tree(tiny.tokenizer),
          'optimizer': {'mu': jnp.zeros(3)},
      })
  return workdir


def test_weights_are_those_of_the_student(tiny, plan, workdir):
  loaded = orbax_files.load(workdir)
  assert loaded.config == tiny.config
  assert loaded.metadata['step'] == 15
  assert loaded.tokenizer.digest == tiny.tokenizer.digest
  quantized = 0
  for name, expected in tiny.weights.items():
    kind = name.split('/')[-1]
    weight = loaded.weights[name]
    if kind in MODES or kind == 'embedding':
      number_format = formats.get('q8_0' if kind == 'embedding' else 'q4_0')
      spec = model_weights.by_layer_specs(tiny.config)[name]
      want = number_format.quantize(expected, spec.contraction)
      assert weight.format == number_format.name
      if MODES.get(kind) not in ('learned', 'lora4'):
        np.testing.assert_array_equal(weight.quantized.codes, want.codes)
      np.testing.assert_array_equal(weight.quantized.scale, want.scale)
      quantized += 1
    else:
      np.testing.assert_array_equal(weight, expected)
  assert quantized == 5 * tiny.config.num_layers + 1


def test_exported_values_are_those_of_the_forward_pass(
    tiny, plan, student, workdir
):
  intercept = lattice.make_intercept(plan)
  seen = {}
  for path in (
      'groups/layer_4/attn_o', 'groups/layer_4/mlp_down', 'tail/layer_1/mlp_up',
      'tail/layer_1/mlp_down', 'embedding',
  ):
    node = student
    for key in path.split('/'):
      node = node[key]
    seen[path] = np.asarray(intercept(path, node))
  weights = orbax_files.load(workdir).weights
  value = lambda name: checkpoints.to_float32(weights[name])
  np.testing.assert_array_equal(
      value('layer_4/attn_o'), seen['groups/layer_4/attn_o'][0]
  )
  for kind in ('mlp_up', 'mlp_down'):
    np.testing.assert_array_equal(
        value(f'layer_7/{kind}'), seen[f'tail/layer_1/{kind}']
    )
  np.testing.assert_array_equal(
      value('layer_4/mlp_down'), seen['groups/layer_4/mlp_down'][0]
  )
  np.testing.assert_array_equal(value('embedding'), seen['embedding'])


def test_rows_are_those_of_the_whole_weight(tiny, workdir):
  entries = orbax_files.load(workdir).weights.entries
  for name, entry in entries.items():
    rows = slice(1, 1 + entry.shape[0] // 2)
    whole, part = entry.read(slice(None)), entry.read(rows)
    np.testing.assert_array_equal(
        checkpoints.to_float32(part), checkpoints.to_float32(whole)[rows]
    )


def test_groups_are_stored_layer_by_layer(tmp_path):
  """So that reading a layer decodes no other, whatever the model's size."""
  node = {'codes': np.ones((3, 4, 64), np.int8), 'scale': np.ones((3, 4, 2))}
  rest = np.ones((3, 4, 64), np.float32)
  with orbax_files.context():
    ocp.save_checkpointables(tmp_path / '1', {'student': {
        'groups': {'layer_0': {'attn_q': node}}, 'tail': {'x': rest},
    }})
  folder = tmp_path / '1' / 'student'
  chunk = lambda name: ts.open(
      orbax_arrays.spec(folder, name, is_zarr3=True), open=True, read=True
  ).result().chunk_layout.read_chunk.shape
  assert chunk('groups.layer_0.attn_q.codes') == (1, 4, 64)
  assert chunk('groups.layer_0.attn_q.scale') == (1, 4, 2)
  assert chunk('tail.x') == (3, 4, 64)


@pytest.mark.parametrize('node', [
    {'codes': np.ones((512, 64), np.int8), 'scale': np.ones((512, 1))},
    {'codes': np.ones((512, 64), np.int8)},
    {'scale': np.ones((512, 64))},
    {'master': np.ones((512, 64)), 'scale': np.ones((512, 2))},
    np.ones((512, 64)),
])
def test_nodes_of_another_mode_are_refused(
    tiny, plan, student, tmp_path, node
):
  """Nothing is multiplied with parts that do not belong together."""
  with orbax_files.context():
    ocp.save_checkpointables(tmp_path / '3', {
        'student': dict(student) | {'embedding': node},
        'manifest': orbax_files.manifest(tiny.config, plan, 3, 'test'),
    })
  with pytest.raises(errors.UserError, match='at embedding where'):
    orbax_files.load(tmp_path)


def test_manifest_is_plain_json_on_disk(workdir):
  files = list((workdir / 'checkpoints' / '15' / 'manifest').iterdir())
  read = [json.loads(f.read_text()) for f in files if f.suffix == '.json']
  assert read[0]['quant']['embedding'] == ['q8_0', 'codes']


def test_a_student_spread_over_devices_is_read_whole(
    tiny, plan, student, tmp_path
):
  devices = jax.devices()
  if len(devices) < 2:
    pytest.skip('needs two devices')
  mesh = jax.make_mesh((2,), ('x',), devices=devices[:2])
  spread = jax.sharding.NamedSharding(mesh, jax.P('x'))
  moved = dict(student) | {
      'final_norm': jax.device_put(student['final_norm'], spread)
  }
  with orbax_files.context():
    ocp.save_checkpointables(tmp_path / '3', {
        'student': moved,
        'manifest': orbax_files.manifest(tiny.config, plan, 3, 'test'),
    })
  loaded = orbax_files.load(tmp_path)
  np.testing.assert_array_equal(
      loaded.weights['final_norm'], tiny.weights['final_norm']
  )
  assert loaded.tokenizer is None


def test_newest_whole_step_is_found(workdir, tmp_path):
  steps = workdir / 'checkpoints'
  assert {p.name for p in steps.iterdir()} == {'10', '15'}
  for path in (workdir, steps, steps / '15'):
    assert orbax_files.find_step(path) == steps / '15'
  assert orbax_files.find_step(steps / '10') == steps / '10'
  copy = tmp_path / 'copy'
  shutil.copytree(steps, copy)
  # What a crash in the middle of a save leaves behind.
  (copy / '15').rename(copy / '15.orbax-checkpoint-tmp')
  (copy / '20').mkdir()
  assert orbax_files.find_step(copy) == copy / '10'
  assert not orbax_files.is_ours(tmp_path / 'nothing')
  with pytest.raises(errors.UserError, match='no whole checkpoint'):
    orbax_files.find_step(tmp_path)


def test_damaged_steps_are_named(workdir, tmp_path):
  source = workdir / 'checkpoints' / '15'

  def refuse(reason, damage):
    step = tmp_path / '15'
    shutil.copytree(source, step)
    damage(step)
    with pytest.raises(errors.UserError, match=reason):
      checkpoint = orbax_files.load(step)
      checkpoints.dequantized(checkpoint)
    shutil.rmtree(step)

  manifest = json.loads((source / 'manifest' / 'data.json').read_text())
  write = lambda step, contents: (
      step / 'manifest' / 'data.json'
  ).write_text(contents)
  refuse('manifest', lambda s: write(s, '{"a": '))
  refuse('manifest', lambda s: write(s, '{}'))
  refuse('version 99', lambda s: write(s, json.dumps(
      manifest | {'version': 99})))
  refuse('does not fit', lambda s: write(s, json.dumps(
      manifest | {'model': manifest['model'] | {'mlp_dim': 96}})))
  refuse('q9', lambda s: write(s, json.dumps(
      manifest | {'quant': {'embedding': ['q9', 'codes']}})))
  refuse('student', lambda s: shutil.rmtree(s / 'student' / 'd'))
  refuse('student', lambda s: (s / 'student' / '_METADATA').unlink())


@pytest.mark.parametrize('said', [
    5, 'x', ['student'], {'student': 7}, {'student': ['x']}, {'../15': {}},
    {'student': {}}, {'nowhere': {}},
])
def test_sums_that_are_none_are_refused(workdir, tmp_path, said):
  step = tmp_path / '15'
  shutil.copytree(workdir / 'checkpoints' / '15', step)
  path = step / 'manifest' / 'data.json'
  manifest = json.loads(path.read_text()) | {'sums': said}
  manifest.pop('digest', None)
  path.write_text(json.dumps(manifest))
  with pytest.raises(errors.UserError, match='15'):
    orbax_files.verify(step)


def test_arrays_without_sums_are_not_what_was_saved(tmp_path):
  """Truth values and numbers of 8 bytes, in place of a weight."""
  for i, dtype in enumerate((bool, np.float64, np.int64)):
    step = tmp_path / str(i)
    with orbax_files.context():
      ocp.save_checkpointables(step, {
          'student': {'x': np.ones(3, dtype)},
          'manifest': {
              'version': 1, 'sums': {'student': {'x': '0' * 16}},
          },
      })
    with pytest.raises(errors.UserError, match='x in its student is not what'):
      orbax_files.verify(step)


def _node(plan, path, weight):
  if path not in plan:
    return jnp.asarray(weight)
  node = lattice.init_node(
      jnp.asarray(weight), *plan[path], stacked=path.startswith('groups/')
  )
  if isinstance(node, dict) and 'lora_b' in node:
    # Zeros at the start: they would change nothing.
    draw = np.random.default_rng(0).standard_normal(node['lora_b'].shape)
    node['lora_b'] = jnp.asarray(0.1 * draw, jnp.float32)
  return node
