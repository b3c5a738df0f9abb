import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.quant import formats
from gemma_qat.quant import recover

_Q4_0 = formats.FORMATS['q4_0']
_TYPES = ['float32', 'float16', 'bfloat16']

# A warning here is a number that went out of hand.
pytestmark = [
    pytest.mark.filterwarnings('error::RuntimeWarning'),
    pytest.mark.parametrize('stored_as', _TYPES),
]


def _rounded(x, stored_as):
  with np.errstate(over='ignore'):
    return np.float32(x).astype(jnp.dtype(stored_as)).astype(np.float32)


def _values(codes, scale, stored_as):
  """The definition: [n, 32] codes and [n] scales to what a file holds."""
  levels = codes.astype(np.float32) - 8
  return _rounded(scale[:, None] * levels, stored_as)


def _scales(rng, count, low=-12, high=2):
  """float16 values of both signs, evenly over the powers of two."""
  d = 2.0 ** rng.uniform(low, high, count) * rng.choice([-1, 1], count)
  return d.astype(np.float16).astype(np.float32)


def _codes(rng, count, low=0, high=15):
  """Codes with a peak at the highest level, whose neighbour is there too."""
  codes = rng.integers(low, high, (count, 32), endpoint=True)
  codes[:, 3], codes[:, 20] = low, low + 1
  return codes.astype(np.int8)


def _gaussian(rng, count, stored_as):
  return _rounded(rng.standard_normal((count, 32)) * 0.02, stored_as)


def _assert_explained(result, weight, stored_as):
  """All found, and the file dequantizes to the weight."""
  assert result.found.all()
  np.testing.assert_array_equal(
      result.scale, result.scale.astype(np.float16).astype(np.float32)
  )
  assert result.codes.dtype == np.int8 and result.scale.dtype == np.float32
  assert result.codes.min() >= 0 and result.codes.max() <= 15
  stored = _Q4_0.dequantize(formats.Quantized(result.codes, result.scale))
  np.testing.assert_array_equal(_rounded(stored, stored_as), weight)


@functools.cache
def _every_lattice(stored_as):
  """The magnitudes of levels 0..8 under each positive d."""
  d = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16)
  d = d.astype(np.float32)
  return d, _rounded(d[:, None] * np.arange(9), stored_as)


def _explanations(block, stored_as):
  """All (level of the peak, |d|) that explain a block, by trying each d."""
  d, table = _every_lattice(stored_as)
  magnitude = np.abs(block)
  found = []
  for i in np.flatnonzero((table == magnitude.max()).any(axis=1)):
    levels = magnitude[:, None] == table[i]
    signs = np.sign(block[levels[:, 8]])
    if levels.any(axis=1).all() and len(set(signs)) <= 1:
      peak = levels[np.argmax(magnitude)].argmax()
      found.append((int(peak), float(d[i])))
  return found


@pytest.mark.parametrize('seed', range(4))
def test_any_scales_and_codes_are_found_again(stored_as, seed):
  rng = np.random.default_rng(seed)
  codes, scale = _codes(rng, 600), _scales(rng, 600)
  weight = _values(codes, scale, stored_as)
  result = recover.recover_q4_0(weight, stored_as)
  _assert_explained(result, weight, stored_as)
  # Level -8 is there, so the sign of d and with it the codes are unique.
  np.testing.assert_array_equal(result.codes, codes)
  off = np.abs(result.scale[:, 0] / scale - 1)
  # 8 * d loses nothing but in bfloat16, where two d of one peak are a step
  # apart at most.
  assert off.max() <= (2**-7 if stored_as == 'bfloat16' else 0)


@pytest.mark.parametrize('peak', range(1, 8))
def test_a_peak_below_level_8_is_found_and_its_scale_taken_positive(
    stored_as, peak
):
  rng = np.random.default_rng(peak)
  codes, scale = _codes(rng, 200, 8 - peak, 8 + peak), _scales(rng, 200)
  weight = _values(codes, scale, stored_as)
  result = recover.recover_q4_0(weight, stored_as)
  _assert_explained(result, weight, stored_as)
  # Only code 0 calls for a sign.
  assert np.all((result.scale[:, 0] > 0) | (result.codes == 0).any(axis=1))
  if peak <= 4:
    return  # Twice the levels of half the scale are the same weights.
  np.testing.assert_array_equal(
      result.codes, np.where(scale[:, None] > 0, codes, 16 - codes)
  )
  if stored_as == 'float32':
    np.testing.assert_array_equal(result.scale[:, 0], np.abs(scale))


def test_the_symmetric_lattice_is_kept_where_the_reference_rule_loses_it(
    stored_as,
):
  rng = np.random.default_rng(0)
  master = rng.standard_normal((500, 32)).astype(np.float32) * 0.02
  scale = np.abs(master).max(axis=1) / 7
  scale = scale.astype(np.float16).astype(np.float32)
  codes = np.clip(np.rint(master / scale[:, None]), -7, 7) + 8
  weight = _values(codes, scale, stored_as)
  _assert_explained(
      recover.recover_q4_0(weight, stored_as), weight, stored_as
  )
  requantized = _rounded(_Q4_0.fake_quantize(jnp.asarray(weight)), stored_as)
  assert not (requantized == weight).all(axis=1).any()


def test_what_the_reference_rule_keeps_gets_its_codes_and_scales(stored_as):
  rng = np.random.default_rng(1)
  once = _Q4_0.quantize(jnp.asarray(_gaussian(rng, 3000, 'float32')))
  weight = _rounded(_Q4_0.dequantize(once), stored_as)
  again = _Q4_0.quantize(jnp.asarray(weight))
  kept = _rounded(_Q4_0.dequantize(again), stored_as) == weight
  kept = kept.all(axis=1)
  assert kept.mean() > 0.1
  result = recover.recover_q4_0(weight, stored_as)
  _assert_explained(result, weight, stored_as)
  np.testing.assert_array_equal(result.scale[kept], again.scale[kept])
  np.testing.assert_array_equal(result.codes[kept], again.codes[kept])


def test_scales_of_bfloat16_are_found_as_such(stored_as):
  rng = np.random.default_rng(2)
  scale = _rounded(_scales(rng, 2000), 'bfloat16')
  weight = _values(_codes(rng, 2000), scale, stored_as)
  result = recover.recover_q4_0(weight, stored_as)
  _assert_explained(result, weight, stored_as)
  short = _rounded(result.scale, 'bfloat16') == result.scale
  np.testing.assert_array_equal(short, True)


def test_subnormal_and_huge_scales_are_found(stored_as):
  rng = np.random.default_rng(3)
  for low, high in ((-24, -14), (13, 15.9)):
    codes, scale = _codes(rng, 400), _scales(rng, 400, low, high)
    codes[::2] = codes[::2] // 4 + 6
    weight = _values(codes, scale, stored_as)
    # 8 of the largest scales are more than float16 holds.
    finite = np.isfinite(weight).all(axis=1)
    assert finite.sum() > 100
    weight = weight[finite]
    _assert_explained(
        recover.recover_q4_0(weight, stored_as), weight, stored_as
    )


def test_zeros_are_found_as_the_reference_rule_has_them(stored_as):
  weight = np.zeros((3, 64), np.float32)
  weight[1] = -0.0
  result = recover.recover_q4_0(weight, stored_as)
  assert result.found.all()
  reference = _Q4_0.quantize(jnp.asarray(weight))
  np.testing.assert_array_equal(result.codes, reference.codes)
  np.testing.assert_array_equal(result.scale, 0)
  np.testing.assert_array_equal(
      np.signbit(result.scale), np.signbit(reference.scale)
  )
  assert recover.share_on_lattice(weight, stored_as) == 1.0


def test_what_lies_below_every_lattice_is_not_taken_for_zeros(stored_as):
  for tiny in (2.0**-140, 2.0**-25):
    weight = np.full((1, 32), tiny, np.float32)
    assert not recover.recover_q4_0(weight, stored_as).found.any()
    weight = np.full((1, 32), 0.25, np.float32)
    assert recover.recover_q4_0(weight, stored_as).found.all()
    weight[0, 9] = tiny
    assert not recover.recover_q4_0(weight, stored_as).found.any()


def test_exactly_the_blocks_with_a_moved_weight_are_lost(stored_as):
  rng = np.random.default_rng(4)
  scale = _scales(rng, 900)
  weight = _values(_codes(rng, 900), scale, stored_as).reshape(100, 9, 32)
  moved = rng.random((100, 9)) < 0.3
  rows, blocks = np.nonzero(moved)
  where = rows, blocks, rng.integers(0, 32, len(rows))
  half = 0.5 * scale.reshape(100, 9)[moved]
  weight[where] = _rounded(weight[where] + half, stored_as)
  weight = weight.reshape(100, 288)
  result = recover.recover_q4_0(weight, stored_as)
  np.testing.assert_array_equal(result.found, ~moved)
  values = _Q4_0.dequantize(formats.Quantized(result.codes, result.scale))
  kept = _rounded(values, stored_as) == weight
  np.testing.assert_array_equal(
      kept.reshape(100, 9, 32).all(axis=-1), ~moved
  )
  reference = _Q4_0.quantize(jnp.asarray(weight))
  np.testing.assert_array_equal(
      result.codes.reshape(100, 9, 32)[moved],
      np.reshape(reference.codes, (100, 9, 32))[moved],
  )
  np.testing.assert_array_equal(
      result.scale[moved], np.asarray(reference.scale)[moved]
  )


def _hard_blocks(rng, stored_as):
  """Blocks on lattices, beside them and around the smallest numbers."""
  peaks = np.tile(np.arange(1, 9), 30)
  levels = rng.integers(-8, 8, (len(peaks), 32))
  levels = np.clip(levels, -peaks[:, None], np.minimum(peaks, 7)[:, None])
  levels *= rng.random(levels.shape) < rng.choice([0.1, 1.0], (len(peaks), 1))
  scale = _scales(rng, len(peaks), -24, 4)
  near = _values(levels + 8, scale, stored_as)
  step = rng.choice([1 - 2.0**-8, 1, 1, 1, 1 + 2.0**-7], near.shape)
  step = np.where(rng.random(near.shape) < 0.1, step, 1)
  units = rng.integers(-20, 21, (60, 32)) * rng.integers(0, 2, (60, 32))
  units *= rng.integers(1, 4, (60, 1))
  return np.concatenate(
      [near, _rounded(near * step, stored_as), np.float32(units * 2.0**-24)]
  )


@pytest.mark.parametrize('seed', range(3))
def test_found_are_those_blocks_that_trying_every_scale_explains(
    stored_as, seed
):
  weight = _hard_blocks(np.random.default_rng(seed), stored_as)
  result = recover.recover_q4_0(weight, stored_as)
  for i in np.flatnonzero(np.any(weight != 0, axis=1)):
    all_ = _explanations(weight[i], stored_as)
    assert result.found[i, 0] == bool(all_), weight[i]
    if not all_:
      continue
    d, level = abs(float(result.scale[i, 0])), max(all_)[0]
    first_choice = sorted(x for l, x in all_ if l == level)
    assert d in first_choice
    own = float(np.float16(np.abs(weight[i]).max() / 8))
    short = [x for x in first_choice if _rounded(x, 'bfloat16') == x]
    if own in first_choice:
      assert d == own
    elif short:
      assert d in short
    else:
      assert d == first_choice[(len(first_choice) - 1) // 2]
  found = result.found[:, 0]
  assert 0.3 < found.mean() < 0.97
  _assert_explained(
      recover.recover_q4_0(weight[found], stored_as), weight[found], stored_as
  )


def test_plain_weights_are_not_on_a_lattice(stored_as):
  # 20,000 blocks, more than four chunks.
  weight = _gaussian(np.random.default_rng(5), 20_000, stored_as)
  result = recover.recover_q4_0(weight, stored_as)
  assert not result.found.any()
  reference = _Q4_0.quantize(jnp.asarray(weight))
  np.testing.assert_array_equal(result.codes, reference.codes)
  np.testing.assert_array_equal(result.scale, reference.scale)
  assert recover.share_on_lattice(weight, stored_as) == 0.0


def test_blocks_do_not_depend_on_their_neighbours(stored_as):
  rng = np.random.default_rng(6)
  weight = _gaussian(rng, 9000, stored_as)
  weight[::2] = _values(_codes(rng, 4500), _scales(rng, 4500), stored_as)
  whole = recover.recover_q4_0(weight, stored_as)
  np.testing.assert_array_equal(whole.found[:, 0], np.arange(9000) % 2 == 0)
  part = recover.recover_q4_0(weight[4090:4110], stored_as)
  for all_, some in zip(whole, part):
    np.testing.assert_array_equal(all_[4090:4110], some)


def test_the_sample_tells_the_share(stored_as):
  rng = np.random.default_rng(7)
  weight = _gaussian(rng, 8000, stored_as).reshape(2000, 128)
  weight[:500] = _values(
      _codes(rng, 2000), _scales(rng, 2000), stored_as
  ).reshape(500, 128)
  weight[500:1000] = 0
  share = recover.share_on_lattice(weight, stored_as)
  # A third of the blocks that are not zero; 5 standard errors of 768 draws.
  assert abs(share - 1 / 3) < 0.09
  assert recover.share_on_lattice(weight, stored_as, 10**6) == 1 / 3


def test_stacked_arrays_of_the_type_itself_are_read_too(stored_as):
  rng = np.random.default_rng(8)
  weight = _values(_codes(rng, 24), _scales(rng, 24), stored_as)
  weight = weight.reshape(2, 3, 128)
  expected = recover.recover_q4_0(weight, stored_as)
  assert expected.codes.shape == (2, 3, 128)
  assert expected.scale.shape == expected.found.shape == (2, 3, 4)
  typed = jax.device_put(weight.astype(jnp.dtype(stored_as)))
  for ours, theirs in zip(expected, recover.recover_q4_0(typed, stored_as)):
    np.testing.assert_array_equal(ours, theirs)
  packed = _Q4_0.pack(formats.Quantized(expected.codes, expected.scale))
  again = _Q4_0.unpack(packed, weight.shape)
  np.testing.assert_array_equal(again.codes, expected.codes)
  np.testing.assert_array_equal(again.scale, expected.scale)


def test_values_that_the_type_does_not_have_are_not_found(stored_as):
  rng = np.random.default_rng(9)
  scale = _scales(rng, 300)
  exact = _values(_codes(rng, 300), scale, 'float32')
  result = recover.recover_q4_0(exact, stored_as)
  of_type = (_rounded(exact, stored_as) == exact).all(axis=1)
  np.testing.assert_array_equal(result.found[:, 0], of_type)
  assert of_type.all() == (stored_as == 'float32')


def test_broken_weights_are_not_found(stored_as):
  for wrong in (np.nan, np.inf, -np.inf):
    weight = np.full((2, 32), 0.5, np.float32)
    weight[1, 5] = wrong
    result = recover.recover_q4_0(weight, stored_as)
    np.testing.assert_array_equal(result.found[:, 0], [True, False])


def test_a_wrong_type_or_shape_is_named(stored_as):
  with pytest.raises(errors.UserError, match='float8.*float32, float16, bfl'):
    recover.recover_q4_0(np.zeros((1, 32), np.float32), 'float8')
  with pytest.raises(errors.UserError, match=r'multiple of 32.*\(1, 40\)'):
    recover.share_on_lattice(np.zeros((1, 40), np.float32), stored_as)
