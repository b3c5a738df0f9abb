"""Codes stay codes, lattices are recovered, the rest is rounded by the rule."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import prepare
from gemma_qat.quant import formats

_Q4_0 = formats.FORMATS['q4_0']
_NAME = 'layer_2/mlp_up'


@pytest.fixture(scope='module')
def learned(tiny):
  """A weight whose scales no rule would find again, and its Stored."""
  shape = tiny.weights.entries[_NAME].shape
  rng = np.random.default_rng(0)
  # No block has code 0, where the reference rule puts its peak.
  codes = rng.integers(1, 16, shape).astype(np.int8)
  scale = rng.uniform(-1, 1, (*shape[:-1], shape[-1] // 32)) * 0.01
  scale = scale.astype(np.float16).astype(np.float32)
  return checkpoints.Stored('q4_0', formats.Quantized(codes, scale))


def _with(tiny, value, **changes):
  entries = tiny.weights.entries
  entries[_NAME] = checkpoints.from_arrays({_NAME: value}).entries[_NAME]
  entries[_NAME] = entries[_NAME]._replace(**changes)
  return dataclasses.replace(tiny, weights=checkpoints.Weights(entries))


def test_codes_stay_what_they_are(tiny, learned):
  rounding = prepare.Rounding()
  prepared = prepare.prepare(_with(tiny, learned), {_NAME: 'q4_0'}, rounding)
  read = prepared.weights[_NAME]
  np.testing.assert_array_equal(read.quantized.codes, learned.quantized.codes)
  np.testing.assert_array_equal(read.quantized.scale, learned.quantized.scale)
  assert (rounding.share, rounding.change.count) == (None, 0)


@pytest.mark.parametrize(
    'dtype', [np.float32, np.float16, ml_dtypes.bfloat16]
)
def test_a_lattice_is_recovered_and_counted(tiny, learned, dtype):
  values = checkpoints.to_float32(learned).astype(dtype).astype(np.float32)
  given = _with(tiny, values, type=np.dtype(dtype).name)
  rounding = prepare.Rounding()
  read = prepare.prepare(given, {_NAME: 'q4_0'}, rounding).weights[_NAME]
  assert rounding.share == 1
  assert rounding.change.count == 0
  np.testing.assert_array_equal(
      checkpoints.to_float32(read).astype(dtype).astype(np.float32), values
  )


def test_without_recovery_the_rule_rounds_as_ever(tiny, learned):
  values = checkpoints.to_float32(learned)
  rounding = prepare.Rounding()
  read = prepare.prepare(
      _with(tiny, values), {_NAME: 'q4_0'}, rounding, recover_lattices=False
  ).weights[_NAME]
  expected = _Q4_0.quantize(values)
  np.testing.assert_array_equal(read.quantized.codes, expected.codes)
  np.testing.assert_array_equal(read.quantized.scale, expected.scale)
  assert rounding.share is None
  assert rounding.change.count == values.size
  assert rounding.change.relative_rms > 0.01


def test_blocks_off_the_lattice_alone_are_rounded(tiny, learned):
  values = checkpoints.to_float32(learned).copy()
  values[3, 5] *= 1.01
  rounding = prepare.Rounding()
  prepared = prepare.prepare(_with(tiny, values), {_NAME: 'q4_0'}, rounding)
  read = checkpoints.to_float32(prepared.weights[_NAME])
  assert rounding.found == rounding.blocks - 1
  assert rounding.change.count == 32
  off = np.zeros(values.shape, bool)
  off[3, :32] = True
  np.testing.assert_array_equal(read[~off], values[~off])


def test_pieces_join_to_the_whole(tiny):
  prepared = prepare.prepare(tiny, {_NAME: 'q4_0'})
  whole = prepared.weights[_NAME]
  pieces = [p for _, p in prepared.weights.pieces(_NAME, largest=500)]
  assert len(pieces) > 5
  np.testing.assert_array_equal(
      np.concatenate([p.quantized.codes for p in pieces]),
      whole.quantized.codes,
  )


def test_norms_and_unnamed_weights_are_left_alone(tiny):
  names = ['final_norm', 'layer_0/attn_pre_norm', _NAME]
  prepared = prepare.prepare(tiny, dict.fromkeys(names, 'q8_0'))
  formats_of = {n: e.format for n, e in prepared.weights.entries.items()}
  assert formats_of.pop(_NAME) == 'q8_0'
  assert set(formats_of.values()) == {None}


def test_a_lattice_is_seen_from_a_few_matrices(tiny, mixed):
  stored = dataclasses.replace(tiny, weights=checkpoints.from_arrays(mixed))
  assert prepare.lattice_share(stored) == 1
  floats = dataclasses.replace(tiny, weights=checkpoints.from_arrays({
      n: checkpoints.to_float32(w) for n, w in stored.weights.items()
  }))
  assert prepare.lattice_share(floats) == 1
  assert prepare.lattice_share(tiny) == 0


def test_a_piece_that_is_read_twice_counts_once(tiny):
  rounding = prepare.Rounding()
  weights = prepare.prepare(tiny, {_NAME: 'q4_0'}, rounding).weights
  for _ in range(2):
    for _ in weights.pieces(_NAME, largest=500):
      pass
  size = tiny.weights[_NAME].size
  assert rounding.change.count == size
  assert rounding.blocks == size // 32
