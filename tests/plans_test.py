"""The table of plans has a row for every slice that the configs name."""

import importlib
import math

import jax
import pytest

from experiments import plans
from gemma_qat import sharding
from gemma_qat.commands import config_flags
from gemma_qat.model import config as model_config
from gemma_qat.model import weights
from gemma_qat.training import settings
from gemma_qat.training import student as student_lib
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
  sizes = s.mesh.data, s.mesh.fsdp, s.mesh.tensor
  assert math.prod(sizes) == topologies.parse(plans.topology(variant)).count
  mesh = jax.sharding.AbstractMesh(sizes, sharding.MESH_AXES)
  sharding.check(mesh, 'batch', (s.train.batch_size,), ('batch',))
  model = model_config.variant(size.partition('_')[0])
  plan = student_lib.make_plan(model, s.quant)
  for path, spec in weights.tree_specs(model).items():
    sharding.check(
        mesh, path, spec.shape, spec.axes, block=32 if path in plan else 1
    )
