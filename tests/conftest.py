"""What every test runs on: eight fake CPU devices, no silent broadcasting."""

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

import jax  # pylint: disable=wrong-import-position

jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_sessionfinish():
  if _OWN_CACHE is not None:
    shutil.rmtree(_OWN_CACHE, ignore_errors=True)
