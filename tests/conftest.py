"""What every test runs on: eight fake CPU devices, no silent broadcasting."""

import os

# XLA reads its flags when jax starts the backend.
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
)

import jax  # pylint: disable=wrong-import-position

jax.config.update('jax_numpy_rank_promotion', 'raise')
