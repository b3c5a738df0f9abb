"""What is compiled ahead of time is the program that runs."""

import jax
import pytest

from gemma_qat import sharding
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.commands import config_flags
from gemma_qat.model import weights
from gemma_qat.training import job
from gemma_qat.training import settings
from gemma_qat.training import starts
from gemma_qat.training import student as student_lib

CONFIG = 'experiments/configs/base.py:tiny'


@pytest.mark.parametrize('overrides', [
    (), ("--config.quant.modes=((r'.', 'codes'),)",
         "--config.train.rules=((r'^embedding', None), ('scale$', 'scales'))"),
], ids=['learned', 'codes'])
def test_abstract_arguments_are_those_of_a_run(overrides):
  s = settings.read(config_flags.load(CONFIG, overrides))
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  base = detect.load('random:tiny')
  params = weights.stack(base.config, checkpoints.dequantized(base))
  plan = student_lib.make_plan(base.config, s.quant)
  student = starts.init_student(base.config, params, plan, 'reference')
  real = job.prepare(s, mesh, base, params, plan, student)
  _, described = job.abstract(s, mesh, base.config)
  outline = lambda tree: jax.tree.map(
      lambda x: (x.shape, x.dtype, x.sharding), tree
  )
  for found, expected in zip(
      described, (real.state, real.settled, real.teacher), strict=False
  ):
    assert outline(found) == outline(expected)
  tokens = described[3]['tokens']
  assert tokens.shape == (s.train.batch_size, s.train.length)
