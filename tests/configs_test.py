"""Every config that can be named loads, is locked and makes sense."""

import importlib
import pathlib

import pytest

from gemma_qat.model import config as model_config
from gemma_qat.training import settings
from gemma_qat.training import student as student_lib

FOLDER = pathlib.Path(__file__).parents[1] / 'experiments' / 'configs'
NAMES = sorted(
    p.stem for p in FOLDER.glob('*.py') if not p.stem.startswith('_')
)


def _load(name, *variant):
  module = importlib.import_module(f'experiments.configs.{name}')
  return module.get_config(*variant)


def test_there_are_configs():
  assert 'base' in NAMES


@pytest.mark.parametrize('variant', ['', 'tiny'])
@pytest.mark.parametrize('name', NAMES)
def test_a_config_is_complete_locked_and_accepted(name, variant):
  config = _load(name, variant)
  assert config.is_locked
  assert config.name == name
  with pytest.raises(AttributeError):
    config.train.stepz = 3
  with pytest.raises(AttributeError):
    config.trane = 3
  quant = settings.quant(config)
  settings.train(config)
  settings.optimizer(config)
  settings.compute(config)
  size = 'tiny' if variant == 'tiny' else '270m'
  assert student_lib.make_plan(model_config.variant(size), quant)


@pytest.mark.parametrize('name', NAMES)
def test_a_config_has_the_keys_of_base(name):
  def keys(config):
    return {
        f'{section}.{key}' if hasattr(value, 'keys') else section
        for section, value in config.items()
        for key in (value if hasattr(value, 'keys') else [''])
    }
  assert keys(_load(name)) == keys(_load('base'))


@pytest.mark.parametrize('name', NAMES)
def test_a_config_opens_with_its_question(name):
  module = importlib.import_module(f'experiments.configs.{name}')
  assert module.__doc__.startswith('Question: ')


@pytest.mark.parametrize('name', NAMES)
def test_an_unknown_variant_is_refused(name):
  with pytest.raises(ValueError, match="'huge'.*:tiny"):
    _load(name, 'huge')
