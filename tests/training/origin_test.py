"""A config comes back from its JSON as it was, or not at all."""

import json

import jax
import pytest

from experiments.configs import base
from experiments.configs import gemma3_270m_small
from experiments.configs.ablations import distances
from gemma_qat import errors
from gemma_qat.training import origin
from gemma_qat.training import workdir as workdirs


@pytest.fixture
def workdir(tmp_path):
  workdirs.claim(tmp_path, base.get_config('tiny'))
  return tmp_path


def _change(workdir, file, change):
  said = json.loads((workdir / file).read_text())
  change(said)
  (workdir / file).write_text(json.dumps(said))


@pytest.mark.parametrize('module', [base, gemma3_270m_small, distances])
def test_the_config_comes_back_as_it_was(tmp_path, module):
  config = module.get_config('tiny')
  workdirs.claim(tmp_path, config)
  again = origin.read_config(tmp_path)
  assert again == config and again.is_locked
  # Equal is not enough: (1,) == (1.0,), and a list is no tuple.
  assert repr(again.to_dict()) == repr(
      {k: config.to_dict()[k] for k in again.to_dict()}
  )
  workdirs.claim(tmp_path, again)


def test_the_known_fields_are_those_of_the_base_config():
  names = set()
  for name, value in base.get_config().to_dict().items():
    fields = value if isinstance(value, dict) else [None]
    names |= {f'{name}.{f}' if f else name for f in fields}
  assert names == set(origin.field_types())


@pytest.mark.parametrize('change, word', [
    (lambda c: c['train'].update(step=1), 'an unknown config.train.step:'),
    (lambda c: c['train'].pop('steps'), 'does not have config.train.steps'),
    (lambda c: c['train'].update(steps='8'), "config.train.steps is '8'"),
    (lambda c: c['train'].update(steps=True), 'config.train.steps is True'),
    (lambda c: c['quant'].update(rules='x'), 'no tuple'),
    (lambda c: c['optimizer'].update(multipliers=[]), 'no dict'),
    (lambda c: c.update(quant=3), 'config.quant'),
    (lambda c: c.update(other=3), 'an unknown config.other'),
])
def test_a_field_that_cannot_be_is_named(workdir, change, word):
  _change(workdir, workdirs.CONFIG, change)
  with pytest.raises(errors.UserError, match=word):
    origin.read_config(workdir)


@pytest.mark.parametrize('text', [
    '{"train": ', '[]', '[' * 100_000, '\xff', '{"a":' * 800 + '1' + '}' * 800,
], ids=['cut', 'list', 'open', 'bytes', 'deep'])
def test_damaged_json_is_one_line(workdir, text):
  (workdir / workdirs.CONFIG).write_text(text, encoding='latin-1')
  with pytest.raises(errors.UserError, match=workdirs.CONFIG):
    origin.read_config(workdir)


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match='holds no run'):
    origin.read_config(tmp_path)


def test_what_changed_since_is_named(workdir):
  revision = origin.read_revision(workdir)
  assert origin.changes(revision) == []
  assert origin.changes(revision | {
      'jax': '0.0.1', 'device': 'abacus', 'no-such-package': '1', '': '2'
  }) == [
      f'device was abacus, now {workdirs.device_name()}',
      f'jax was 0.0.1, now {jax.__version__}',
      'no-such-package was 1, now not installed',
      ' was 2, now not installed',
  ]


def test_a_run_without_a_revision_has_none(workdir):
  (workdir / workdirs.REVISION).unlink()
  assert origin.read_revision(workdir) == {}


def test_another_number_of_devices_is_refused(workdir):
  config = origin.read_config(workdir)
  revision = origin.read_revision(workdir)
  assert revision['devices'] == jax.device_count()
  origin.check_devices(config, revision)
  with pytest.raises(errors.UserError, match='had 3 devices, here are 8'):
    origin.check_devices(config, revision | {'devices': 3})
  # A revision that does not count them: the mesh does, if it is whole.
  origin.check_devices(config, {})
  config = config.unlock()
  config.mesh.data = config.mesh.fsdp = 2
  with pytest.raises(errors.UserError, match='had 4 devices.*count=4'):
    origin.check_devices(config, {})
