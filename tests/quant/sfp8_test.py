"""SFP8 bytes are what gemma.cpp's bit rules say."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.quant import sfp8

# By hand: from 2^-7 on a byte is 8 * (exponent + 15) + eighths beyond the
# power of two, below it 4 * (exponent + 23) + quarters.
_BYTES = [
    (0.0, 0), (1.25 * 2.0**-23, 1), (1.75 * 2.0**-23, 3), (2.0**-22, 4),
    (2.0**-8, 60), (1.75 * 2.0**-8, 63), (2.0**-7, 64), (1.125 * 2.0**-7, 65),
    (0.5, 112), (0.75, 116), (1.0, 120), (1.5, 124), (1.875, 127),
    (-1.25 * 2.0**-23, 0x81), (-2.0**-7, 0xC0), (-1.0, 0xF8), (-1.875, 0xFF),
]


@pytest.mark.parametrize('value, byte', _BYTES)
def test_known_numbers_have_known_bytes(value, byte):
  code = np.asarray(sfp8.encode(jnp.float32([value])))
  assert code.view(np.uint8)[0] == byte
  assert float(sfp8.decode(jnp.asarray(code))[0]) == value


def test_every_byte_but_the_reserved_one_survives():
  codes = np.arange(256).astype(np.uint8).view(np.int8)
  codes = codes[codes != -128]
  values = sfp8.decode(jnp.asarray(codes))
  assert len(set(np.asarray(values).tolist())) == 255
  np.testing.assert_array_equal(sfp8.encode(values), codes)


def test_the_nearest_number_is_chosen():
  magnitudes = np.asarray(sfp8.decode(jnp.arange(128, dtype=jnp.int8)))
  x = np.linspace(-1.875, 1.875, 100_001, dtype=np.float32)
  x = np.concatenate([x, x * np.float32(2.0**-8), x * np.float32(2.0**-16)])
  # Below, gemma.cpp takes zero a little too often (1.5 * 2^-24).
  x = x[np.abs(x) >= 2.0**-23]
  found = np.asarray(sfp8.decode(sfp8.encode(jnp.asarray(x))))
  above = np.searchsorted(magnitudes, np.abs(x)).clip(1, 127)
  best = np.minimum(
      np.abs(magnitudes[above] - np.abs(x)),
      np.abs(magnitudes[above - 1] - np.abs(x)),
  )
  # Rounding to bfloat16 comes first and may move x by 2^-8 of itself.
  slack = np.abs(x) * 2.0**-7
  assert np.all(np.abs(found - x) <= best + slack)
  assert np.all((np.sign(found) == np.sign(x)) | (found == 0))


def test_what_is_too_large_becomes_the_largest():
  codes = sfp8.encode(jnp.float32([1.9, -3.0, 1e30, -np.inf]))
  np.testing.assert_array_equal(codes, [127, -1, 127, -1])


def test_a_tensor_is_scaled_down_but_never_up():
  assert sfp8.tensor_scale(1.875) == 1
  assert sfp8.tensor_scale(0.01) == 1
  assert sfp8.tensor_scale(0.0) == 1
  assert sfp8.tensor_scale(3.75) == 2
  assert sfp8.tensor_scale(1.0).dtype == np.float32
