"""The table of plans has a row for every slice that the configs name."""

import importlib

import jax
import pytest

from experiments import plans
from gemma_qat import sharding
from gemma_qat.commands import config_flags
from gemma_qat.model import config as model_config
from gemma_qat.training import student as student_lib
from gemma_qat.training import settings
from gemma_qat.training import topologies

VARIANTS = [
    (size, variant)
    for size in plans.CONFIGS
    for variant in importlib.import_module(
        f'experiments.configs.gemma3_{size}'
    ).DEVICES
]


@pytest.mark.parametrize('variant, topology', [
    ('v5p-2x2x4', 'v5p:2x2x4'), ('v5e-4x4', 'v5e:4x4'),
    ('h100-8', 'gpu:8xH100'),
])
def test_a_variant_means_a_topology(variant, topology):
  assert plans.topology(variant) == topology


@pytest.mark.parametrize('size, variant', VARIANTS)
def test_a_variant_has_a_mesh_of_its_slice_and_whole_blocks(size, variant):
  config = config_flags.load(
      f'experiments/configs/gemma3_{size}.py:{variant}'
  )
  s = settings.read(config)
  shape = dict(zip(sharding.MESH_AXES, (s.mesh.data, s.mesh.fsdp, s.mesh.tensor)))
  count = topologies.parse(plans.topology(variant)).count
  assert shape['data'] * shape['fsdp'] * shape['tensor'] == count
  assert s.train.batch_size % (shape['data'] * shape['fsdp']) == 0
  model = model_config.variant(size)
  mesh = jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))
  plan = student_lib.make_plan(model, s.quant)
  student_lib.shardings(
      mesh, model, student_lib.split(
          student_lib.abstract_student(model, plan), {}
      )[1],
  )
