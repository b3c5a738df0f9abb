"""A name means devices, or says what names there are."""

import importlib.util

import jax
import pytest

from gemma_qat import devices
from gemma_qat import errors
from gemma_qat.training import topologies

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason="libtpu is not installed: pip install -e '.[tpu]'",
)


@pytest.mark.parametrize('name, device, count', [
    ('v5p:2x2x4', 'v5p', 16), ('v5e:4x4', 'v5e', 16), ('V6E:2x2', 'v6e', 4),
    ('v4:2x2x1', 'v4', 4), ('v3:2x2', 'v3', 8), ('v5e:1x1', 'v5e', 1),
    ('gpu:8xH100', 'H100', 8), ('gpu:2xRTX 4090', 'RTX 4090', 2),
    ('GPU:1xa100 80gb', 'A100 80GB', 1),
])
def test_names_are_understood(name, device, count):
  found = topologies.parse(name)
  assert (found.device.name, found.count) == (device, count)
  assert found.is_tpu == (device in devices.TPUS)


@pytest.mark.parametrize('name, message', [
    ('', 'v5p:4x4x4.*v5e'), ('v5p', 'v5p:4x4x4.*v5e'),
    ('v9:2x2', 'v5p:4x4x4.*v5e'), ('H100:8', 'v5p:4x4x4.*v5e'),
    ('v5e:4', "'4' are no sizes"), ('v5e:0x2', "'0x2' are no sizes"),
    ('v5e:axb', "'axb' are no sizes"), ('gpu:H100', 'gpu:8xNAME.*H100'),
    ('gpu:0xH100', 'gpu:8xNAME'), ('gpu:8xMI300', 'gpu:8xNAME'),
    ('gpu:8xv5e', 'gpu:8xNAME'),
])
def test_other_names_are_answered_with_those_known(name, message):
  with pytest.raises(errors.UserError, match=message):
    topologies.parse(name)


@needs_libtpu
@pytest.mark.parametrize('name', [
    'v4:2x2x1', 'v5e:1x1', 'v5e:2x4', 'v5p:2x2x2', 'v6e:4x4', 'tpu7x:2x2x1',
])
def test_libtpu_has_as_many_devices_of_the_kind_and_is_silent(name, capfd):
  topology = topologies.parse(name)
  found = topologies.describe(topology)
  assert len(found) == topology.count
  assert devices.find(found[0].device_kind) == topology.device
  assert capfd.readouterr().err == ''
  assert topologies.compiler(topology).startswith('libtpu 0.')


@needs_libtpu
def test_a_slice_that_does_not_exist_is_refused():
  with pytest.raises(errors.UserError, match='v5p:3x3x3.*libtpu'):
    topologies.describe(topologies.parse('v5p:3x3x3'))


def test_gpus_are_simulated_by_as_many_devices():
  found = topologies.describe(topologies.parse('gpu:4xH100'))
  assert found == jax.devices('cpu')[:4]
  with pytest.raises(errors.UserError, match='64 simulated.*8.*of its own'):
    topologies.describe(topologies.parse('gpu:64xH100'))
