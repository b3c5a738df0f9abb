"""Which devices does a name such as v5p:4x4x4 mean, none of them at hand?

TPU slices are described by libtpu, whose compiler then compiles for them on any
machine. No GPU compiler runs without its GPU: the devices of 'gpu:8xH100' are
as many simulated CPU devices, for which the same partitioner works.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any, Sequence

import jax
from jax.experimental import topologies

from gemma_qat import devices
from gemma_qat import errors

# Without them libtpu asks the cloud's metadata server, complains on stderr
# that nobody answers, and lets one process at a time load it.
_QUIET = {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5p-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0',
    'TPU_MIN_LOG_LEVEL': '3',
    'TPU_STDERR_LOG_LEVEL': '3',
}
# Two halves of a chip that JAX sees as one device.
_OPTIONS = {'v4': {'chip_config_name': 'megacore'}}
# Whoever sets this flag has chosen a number already.
_FORCED = 'xla_force_host_platform_device_count'
_FORM = 'TPU:SIZES such as v5p:4x4x4 or v5e:4x4, or gpu:NUMBERxNAME'


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices of one kind, connected.

  Attributes:
    name: as it was asked for.
    device: what is published of one.
    count: how many JAX sees; TPUs before v4 and TPU7x have two a chip.
    is_tpu: whether libtpu compiles for it.
  """

  name: str
  device: devices.Device
  count: int
  is_tpu: bool


def parse(name: str) -> Topology:
  """Understands 'v5p:2x2x4', 'v5e:4x4', 'gpu:8xH100'.

  Raises:
    UserError: of another form, or an unknown device; lists those known.
  """
  kind, colon, sizes = name.partition(':')
  if kind.lower() == 'gpu':
    number, _, gpu = sizes.partition('x')
    device = devices.GPUS.get(getattr(devices.find(gpu), 'name', None))
    if number.isdecimal() and int(number) and device is not None:
      return Topology(name, device, int(number), is_tpu=False)
    raise errors.UserError(
        f'--topology={name}: no such GPUs; give gpu:8xNAME with one of '
        f'{", ".join(devices.GPUS)}.'
    )
  device = devices.TPUS.get(kind.lower())
  if device is None or not colon:
    raise errors.UserError(
        f'--topology={name} is not understood: give {_FORM}; TPUs are '
        f'{", ".join(devices.TPUS)}.'
    )
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){1,2}', sizes):
    raise errors.UserError(
        f'--topology={name}: {sizes!r} are no sizes of a slice; give as many '
        'as it has dimensions, such as v5e:4x4 or v5p:2x2x4.'
    )
  per_chip = 2 if device.name in ('v2', 'v3', 'tpu7x') else 1
  chips = math.prod(map(int, sizes.split('x')))
  return Topology(name, device, chips * per_chip, is_tpu=True)


def describe(topology: Topology) -> Sequence[Any]:
  """Returns devices to compile for, as `sharding.make_mesh` takes them.

  Raises:
    UserError: libtpu is missing or does not know the slice; or JAX runs
      already, with fewer simulated devices.
  """
  return _tpus(topology) if topology.is_tpu else _simulated(topology)


def compiler(topology: Topology) -> str:
  """Names the compiler and its version."""
  if topology.is_tpu:
    return f'libtpu {importlib.metadata.version("libtpu")}'
  return f'XLA:CPU of jaxlib {importlib.metadata.version("jaxlib")}'


def _tpus(topology):
  if importlib.util.find_spec('libtpu') is None:
    raise errors.UserError(
        f'--topology={topology.name} needs the compiler of TPUs (no TPU): '
        "pip install -e '.[tpu]'."
    )
  for key, value in _QUIET.items():
    os.environ.setdefault(key, value)
  _keep_to_cpu()
  kind, _, sizes = topology.name.lower().partition(':')
  options = dict(_OPTIONS.get(kind, {}))
  if math.prod(map(int, sizes.split('x'))) == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    return topologies.get_topology_desc(
        platform='tpu', topology_name=f'{kind}:{sizes}', **options
    ).devices
  except jax.errors.JaxRuntimeError as error:
    raise errors.UserError(
        f'--topology={topology.name}: libtpu does not describe it '
        f'({_short(error)}).'
    ) from error


def _simulated(topology):
  _keep_to_cpu()
  if _FORCED not in os.environ.get('XLA_FLAGS', ''):
    # Once JAX has started it refuses; then it has what it has.
    with contextlib.suppress(RuntimeError):
      jax.config.update('jax_num_cpu_devices', topology.count)
  found = jax.devices('cpu')
  if len(found) < topology.count:
    raise errors.UserError(
        f'--topology={topology.name} takes {topology.count} simulated devices, '
        f'JAX runs with {len(found)}: start a process of its own.'
    )
  return found[: topology.count]


def _keep_to_cpu():
  """Keeps JAX from looking for accelerators, of which none is needed."""
  jax.config.update('jax_platforms', 'cpu')


def _short(error):
  return ' '.join(str(error).split())[:200]
