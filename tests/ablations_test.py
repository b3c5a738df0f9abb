"""Every ablation opens with its question, and every point can be trained."""

import importlib
import pathlib

import pytest

from gemma_qat.commands import sweep_points
from gemma_qat.model import config as model_config
from gemma_qat.training import settings
from gemma_qat.training import starts
from gemma_qat.training import student as student_lib

FOLDER = pathlib.Path('experiments/configs/ablations')
NAMES = sorted(p.stem for p in FOLDER.glob('*.py'))


def test_there_are_ablations():
  assert 'starts' in NAMES


@pytest.mark.parametrize('name', NAMES)
def test_an_ablation_opens_with_its_question_and_command(name):
  module = importlib.import_module(f'experiments.configs.ablations.{name}')
  assert module.__doc__.startswith('Question: ')
  assert f'--config={FOLDER}/{name}.py' in module.__doc__


@pytest.mark.parametrize('variant, size', [('', '270m'), (':tiny', 'tiny')])
@pytest.mark.parametrize('name', NAMES)
def test_every_point_is_accepted(name, variant, size):
  points = sweep_points.read(f'{FOLDER}/{name}.py{variant}')
  assert len(points) > 1
  for point in points:
    assert point.config.is_locked
    s = settings.read(point.config)
    sizes = settings.sizes(point.config, model_config.variant(size))
    plan = student_lib.make_plan(sizes, s.quant)
    starts.check_start(plan, s.quant.start)
    outline = student_lib.outline(sizes, plan)
    assert student_lib.groups(outline, s.train.rules)
