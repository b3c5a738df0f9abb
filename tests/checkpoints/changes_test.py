"""What rounding did is counted by kind of weight, and nothing else is."""

import numpy as np
import pytest

from gemma_qat.checkpoints import changes
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.quant import formats


def test_equal_arrays_and_codes_are_exact():
  counted = changes.Changes()
  values = np.arange(64, dtype=np.float32).reshape(2, 32)
  stored = checkpoints.Stored('q4_0', formats.get('q4_0').quantize(values))
  assert counted.add('layer_0/attn_q', values, values.copy()) == 64
  assert counted.add('embedding', stored, stored) == 64
  assert counted.add('final_norm', values, values) == 64
  assert counted.is_exact
  assert [c.count for c in counted.by_kind.values()] == [64, 64, 64]
  assert all(line.endswith('exact') for line in counted.lines())


def test_zeros_of_either_sign_are_the_same():
  change = changes.Change()
  change.compare(np.float32([0.0, -0.0]), np.float32([-0.0, 0.0]))
  assert (change.count, change.changed) == (2, 0)


def test_differences_are_summed_over_pieces():
  counted = changes.Changes()
  rng = np.random.default_rng(0)
  given = rng.standard_normal((4, 50)).astype(np.float32)
  written = given.copy()
  written[1, :10] += 0.25
  written[3, 7] -= 2
  for g, w in zip(given, written):
    counted.add('layer_3/mlp_down', w, g)
  change = counted.by_kind['matrices']
  assert (change.count, change.changed) == (200, 11)
  assert change.largest == pytest.approx(2)
  error = written.astype(np.float64) - given
  assert change.relative_rms == pytest.approx(
      np.sqrt(np.sum(error**2) / np.sum(given.astype(np.float64) ** 2)),
      rel=1e-6,
  )
  assert not counted.is_exact
  assert '5.5% rounded, by 2 at the most' in counted.lines()[0]
