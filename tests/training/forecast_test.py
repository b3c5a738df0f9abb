"""What is forecast of a run is what its program needs and does."""

import math

import jax
import numpy as np
import pytest
import small_model
import topologies_test

from experiments.configs import base
from gemma_qat import errors
from gemma_qat import sharding
from gemma_qat.model import flops
from gemma_qat.model import weights
from gemma_qat.training import forecast
from gemma_qat.training import topologies

MESH = {'mesh__data': 2, 'mesh__fsdp': 2, 'mesh__tensor': 2}


def _config(**changes):
  config = base.get_config('tiny').unlock()
  for key, value in {'compute__dtype': 'auto', **changes}.items():
    section, field = key.split('__')
    config[section][field] = value
  return config.lock()


@pytest.fixture(scope='module')
def gpus():
  """A forecast of the small model on eight GPUs."""
  return forecast.make(
      _config(**MESH), small_model.CONFIG, topologies.parse('gpu:8xH100')
  )


@pytest.fixture(scope='module')
def tpus():
  """The same on eight TPUs."""
  return forecast.make(
      _config(**MESH), small_model.CONFIG, topologies.parse('v5e:2x4')
  )


def test_arguments_are_those_that_lie_on_a_device(gpus):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  matrices, gains = 0, 0
  for path, spec in weights.tree_specs(small_model.CONFIG).items():
    part = sharding.named(mesh, spec.axes).shard_shape(spec.shape)
    if not spec.contraction:
      gains += math.prod(part)
    elif path != 'embedding':
      matrices += math.prod(part)
  # Masters, a scale for every 32 of them, gains: trained in float32 by Adam,
  # which keeps two moments of each and a count for each group.
  trained = 4 * (matrices + matrices // 32 + gains)
  assert 0 <= gpus.parts['optimizer'] - 2 * trained < 64
  # The embedding stands still as the products take it; the teacher is such.
  head = 2 * 128 * 64 // 4
  # The step, and two counts of steps that were skipped.
  assert gpus.parts['weights'] == trained + head + 3 * 4
  assert gpus.parts['teacher'] == 2 * matrices + 4 * gains + head
  assert gpus.parts['batch'] == 8 // 4 * 64 * (4 + 1)
  assert sum(gpus.parts.values()) == gpus.memory.arguments


def test_bytes_of_a_device_follow_from_the_cut():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  place = lambda *axes: sharding.named(mesh, axes)
  cut = jax.ShapeDtypeStruct(
      (8, 64), np.float32, sharding=place('mlp', 'embed')
  )
  whole = jax.ShapeDtypeStruct((7,), np.int8, sharding=place('norm'))
  assert forecast.device_bytes({'a': cut, 'b': (whole,)}) == 8 * 64 + 7


def test_the_program_computes_what_the_model_asks_for_and_no_less(gpus):
  asked = flops.train_step(small_model.CONFIG, 8, 64)
  assert gpus.model_flops == asked
  # Masked keys, and the head's products that are computed twice, come on top.
  assert asked < 8 * gpus.contents.flops < 3 * asked
  assert not gpus.contents.unknown_loops and not gpus.contents.uncounted


def test_what_fsdp_and_tensor_exchange_is_counted(gpus):
  assert {'all-gather', 'reduce-scatter', 'all-reduce'} <= set(
      gpus.contents.by_kind()
  )
  assert gpus.link_seconds > 0


def test_times_and_shares_follow_from_the_figures(gpus):
  device = gpus.topology.device
  assert gpus.product_seconds == gpus.contents.flops / device.flops
  assert gpus.link_seconds == gpus.contents.sent_bytes / device.link_bandwidth
  assert gpus.best_seconds == max(gpus.product_seconds, gpus.link_seconds)
  # A CPU's compiler knows neither a GPU's memory traffic nor its cycles.
  assert gpus.memory_seconds is gpus.cycle_seconds is None
  assert gpus.estimated_seconds is gpus.utilisation(None) is None
  seconds = gpus.model_flops / (8 * device.flops)
  assert gpus.utilisation(4 * seconds) == pytest.approx(0.25)
  assert gpus.hours(3600) == gpus.steps == 8
  assert gpus.spare == device.memory_bytes - gpus.needed > 0


@topologies_test.needs_libtpu
def test_tpu_and_cpu_compilers_agree_on_the_partitioned_program(gpus, tpus):
  # Two compilers, two texts, one partitioner: the same products.
  assert tpus.contents.flops == pytest.approx(gpus.contents.flops, rel=0.02)
  assert tpus.parts == gpus.parts
  # Layouts are padded to tiles.
  assert tpus.memory.arguments >= sum(tpus.parts.values())
  assert tpus.memory.aliased > 0
  assert not tpus.contents.unknown_loops


@topologies_test.needs_libtpu
def test_a_tpu_has_cycles_and_a_bound_below_its_estimate(tpus):
  assert tpus.contents.cycles > 0
  assert tpus.estimated_seconds == (
      tpus.contents.cycles / tpus.topology.device.clock + tpus.link_seconds
  )
  assert 0 < tpus.best_seconds <= tpus.estimated_seconds
  assert 0 < tpus.utilisation(tpus.estimated_seconds) < 1


@topologies_test.needs_libtpu
def test_what_does_not_fit_is_said_with_the_bytes_it_needs():
  # 8 x 32,768 tokens: the residual stream's copies alone are gigabytes.
  found = forecast.make(
      _config(train__batch_size=1024, train__length=4096),
      small_model.CONFIG, topologies.parse('v5e:1x1'),
  )
  assert found.memory is found.contents is found.best_seconds is None
  assert 'RESOURCE_EXHAUSTED' in found.refusal
  assert found.spare < 0 < found.needed


def test_auto_is_resolved_for_the_target_not_for_this_machine():
  for_target = forecast.for_target(_config(compute__attention='auto'))
  assert for_target.compute.dtype == 'bfloat16'
  assert for_target.compute.attention == 'blockwise'
  asked = forecast.for_target(
      _config(compute__dtype='float32', compute__attention='xla')
  )
  assert asked.compute.dtype, asked.compute.attention == ('float32', 'xla')


@pytest.mark.parametrize('changes, message', [
    ({'mesh__data': 3}, 'needs 3 devices, there are 8: change config.mesh'),
    ({'mesh__data': 1, 'mesh__fsdp': 8}, "axis 'embed'.*does not split into 8"),
    ({'train__batch_size': 6}, 'batch_size.*does not split into 8'),
    ({'train__rules': ((r'biases', 'weights'),)}, 'biases'),
])
def test_what_does_not_fit_together_is_refused_before_compiling(
    changes, message
):
  with pytest.raises(errors.UserError, match=message):
    forecast.make(
        _config(**changes), small_model.CONFIG, topologies.parse('gpu:8xH100')
    )
