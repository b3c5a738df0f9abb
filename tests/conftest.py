"""What every test runs on: eight fake CPU devices, no silent broadcasting."""

import dataclasses
import os
import shutil
import tempfile

# XLA reads its flags when jax starts the backend.
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
)
_CACHE = 'JAX_COMPILATION_CACHE_DIR'
# Compilation is most of the tests' time, and many compile the same: what one
# has compiled the others load, in pytest's other workers and in programs that
# tests start as well.
_OWN_CACHE = None
if _CACHE not in os.environ:
  _OWN_CACHE = os.environ[_CACHE] = tempfile.mkdtemp()
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'

# pylint: disable=wrong-import-position
import jax
import pytest

from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import huggingface_out

jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_sessionfinish():
  if _OWN_CACHE is not None:
    shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.fixture(scope='session')
def one_layer(tmp_path_factory):
  """A checkpoint of tiny's first layer: seconds of compilation less."""
  tiny = detect.load('random:tiny')
  config = dataclasses.replace(tiny.config, variant='custom', num_layers=1)
  names = [n for n in tiny.weights if '/' not in n or n.startswith('layer_0/')]
  folder = tmp_path_factory.mktemp('checkpoint') / 'one_layer'
  weights = checkpoints.from_arrays({n: tiny.weights[n] for n in names})
  one = dataclasses.replace(tiny, config=config, weights=weights)
  huggingface_out.save(folder, one, 'float32')
  return folder
