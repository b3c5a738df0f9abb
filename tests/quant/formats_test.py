import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.quant import formats
from gemma_qat.quant import sfp8

_NAMES = (*formats.FORMATS, 'q4_0_bf16')


def _weight(shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape) * 0.05


@pytest.mark.parametrize('name', _NAMES)
def test_fake_quantize_is_the_stored_value_bit_by_bit_jitted_or_not(name):
  format_ = formats.get(name)
  weight = _weight((8, 4, 64))
  stored = format_.dequantize(format_.quantize(weight, 2))
  np.testing.assert_array_equal(format_.fake_quantize(weight, 2), stored)
  jitted = jax.jit(format_.fake_quantize, static_argnums=1)
  np.testing.assert_array_equal(jitted(weight, 2), stored)
  assert np.any(stored != weight)


@pytest.mark.parametrize('name', _NAMES)
def test_quantizing_twice_changes_nothing(name):
  format_ = formats.get(name)
  stored = format_.fake_quantize(_weight((16, 64)))
  np.testing.assert_array_equal(format_.fake_quantize(stored), stored)


@pytest.mark.parametrize('name', _NAMES)
def test_the_gradient_passes_straight_through(name):
  format_ = formats.get(name)
  weight, g = _weight((4, 64)), _weight((4, 64), 1)
  loss = lambda w: jnp.vdot(format_.fake_quantize(w), g)
  np.testing.assert_array_equal(jax.grad(loss)(weight), g)


@pytest.mark.parametrize('name', _NAMES)
def test_stacking_layers_does_not_change_them(name):
  format_ = formats.get(name)
  layers = [_weight((4, 2, 32), i) for i in range(3)]
  stacked = format_.fake_quantize(jnp.stack(layers), 2)
  for one, layer in zip(stacked, layers):
    np.testing.assert_array_equal(one, format_.fake_quantize(layer, 2))


def test_blocks_of_a_weight_with_two_input_axes_are_those_of_its_rows():
  weight = _weight((8, 4, 64))
  q4_0 = formats.get('q4_0')
  rows = q4_0.quantize(weight.reshape(8, 256))
  np.testing.assert_array_equal(
      q4_0.pack(q4_0.quantize(weight, 2)).reshape(8, -1), q4_0.pack(rows)
  )


@pytest.mark.parametrize('name', ['int4', 'sfp8'])
def test_per_channel_scales_cover_all_contracted_axes(name):
  codes, scale = formats.get(name).quantize(_weight((8, 4, 64)), 2)
  assert codes.shape == (8, 4, 64) and codes.dtype == jnp.int8
  assert scale.shape == (8, 1, 1)


def test_int4_is_symmetric():
  weight = _weight((8, 64))
  int4 = formats.get('int4')
  codes, scale = int4.quantize(weight)
  opposite = int4.quantize(-weight)
  np.testing.assert_array_equal(opposite.codes, -codes)
  np.testing.assert_array_equal(opposite.scale, scale)
  assert int(jnp.abs(codes).max(axis=1).min()) == 7


def test_a_channel_of_zeros_stays_zero():
  for name in _NAMES:
    values = formats.get(name).fake_quantize(jnp.zeros((2, 32)))
    np.testing.assert_array_equal(values, jnp.zeros((2, 32)))


def _decode_sfp8(byte):
  """The definition with an exponent, a mantissa and a bias, in Python."""
  sign, m = (-1.0 if byte & 0x80 else 1.0), byte & 0x7F
  if m == 0:
    return 0.0
  bits, bias = (3, 15) if m >= 64 else (2, 23)
  return sign * (1 + (m % 2**bits) / 2**bits) * 2.0 ** ((m >> bits) - bias)


def test_every_sfp8_byte_decodes_and_encodes_to_itself():
  byte = np.array([b for b in range(256) if b != 0x80], np.uint8)
  expected = np.array([_decode_sfp8(int(b)) for b in byte], np.float32)
  codes = byte.view(np.int8)
  np.testing.assert_array_equal(sfp8.decode(codes), expected)
  # 1.875 is among them, so the channel's scale is 1.
  encoded, scale = formats.get('sfp8').quantize(jnp.asarray(expected[None]))
  np.testing.assert_array_equal(encoded[0], codes)
  assert float(scale[0, 0]) == 1.0


# Source of the values: gemma.cpp, compression/sfp_test.cc (TestGolden).
_SFP8_GOLDEN = [
    (0.46875, 0.46875), (0.484375, 0.5), (0.96875, 1.0), (0.28125, 0.28125),
    (0.296875, 0.3125), (0.59375, 0.625), (0.279296875, 0.28125),
    (0.265625, 0.25), (0.53125, 0.5), (0.0068359375, 0.0068359375),
    (0.00732421875, 0.0078125), (0.007568359375, 0.0078125), (1.0625, 1.0),
    (2.0**-22, 2.0**-22), (1.25 * 2.0**-23, 1.25 * 2.0**-23),
    (2.0**-23, 1.25 * 2.0**-23), (2.0**-24, 0.0), (1.5 * 2.0**-24, 0.0),
    (1.875 * 2.0**-24, 1.25 * 2.0**-23), (0.013841, 0.013671875),
]


@pytest.mark.parametrize('value, expected', _SFP8_GOLDEN)
def test_sfp8_rounds_as_gemma_cpp(value, expected):
  weight = jnp.float32([[1.875, value, -value]])
  np.testing.assert_array_equal(
      formats.get('sfp8').fake_quantize(weight)[0, 1:], [expected, -expected]
  )


@pytest.mark.parametrize('name', ['q4_0', 'q8_0'])
def test_a_last_axis_that_blocks_do_not_divide_is_named(name):
  with pytest.raises(errors.UserError, match=r'multiple of 32.*\(4, 40\)'):
    formats.get(name).quantize(jnp.zeros((4, 40)))


def test_bytes_that_do_not_fit_are_named():
  with pytest.raises(errors.UserError, match=r'17 bytes.*\(1, 32\)'):
    formats.get('q4_0').unpack(np.zeros((1, 17), np.uint8), (1, 32))


def test_a_format_without_a_gguf_type_does_not_pack():
  int4 = formats.get('int4')
  with pytest.raises(errors.UserError, match='q4_0, q8_0'):
    int4.pack(int4.quantize(jnp.ones((1, 32))))


def test_an_unknown_format_lists_the_known():
  with pytest.raises(errors.UserError, match='q5.*q4_0, q8_0, int4, sfp8'):
    formats.get('q5')


def test_bits_per_weight_are_those_of_the_packed_bytes():
  for name in ('q4_0', 'q8_0'):
    format_ = formats.get(name)
    packed = format_.pack(format_.quantize(_weight((4, 320))))
    assert packed.shape == (4, 320 * format_.bits_per_weight / 8)


def test_a_bf16_safe_format_is_a_subset_that_files_call_by_its_base():
  q4_0 = formats.get('q4_0')
  safe = formats.bf16_safe(q4_0)
  assert safe is formats.get('q4_0_bf16') is formats.bf16_safe(safe)
  assert safe.stored_as == q4_0.stored_as == 'q4_0'
  stored = safe.quantize(_weight((8, 64)))
  np.testing.assert_array_equal(q4_0.pack(stored), safe.pack(stored))
  np.testing.assert_array_equal(
      q4_0.dequantize(stored), safe.dequantize(stored)
  )
  for name in ('q8_0', 'int4', 'sfp8'):
    assert formats.bf16_safe(formats.get(name)) is formats.get(name)


def test_a_type_of_gguf_means_one_format():
  types = [f.ggml_type for f in formats.FORMATS.values() if f.ggml_type]
  assert len(types) == len(set(types))
