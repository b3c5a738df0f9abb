"""Which Q4_0 codes and scales does a float weight come from?

A checkpoint may lie on a Q4_0 lattice: 32 consecutive weights of it are
float16(d) * (code - 8), rounded to the type that it was saved in. The reference
rule takes d from the largest weight as if its code were 0, which changes each
block that has no code 0. Here codes and d are read from the weights themselves.

The largest magnitude stands for a level m in 1..8, and with m the levels of all
others are known: for a float16 d, neighbouring levels lie further apart than
rounding can carry them. What a weight of known level says of d is an interval,
the values that round to the weight, over its level. The d that explain a block
are the float16 values in the intersection of 32 such intervals.

All of it in numpy: XLA flushes subnormals and drops pairs of casts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat import errors
from gemma_qat.quant import formats
from gemma_qat.quant import ggml

_Q4_0 = formats.FORMATS['q4_0']

# Mantissa bits of float32 that the type lacks.
_MISSING_BITS = {'float32': 0, 'float16': 13, 'bfloat16': 16}
# Blocks looked at together, 2^17 weights: temporaries stay near the cache.
_CHUNK = 2**12
# Weights of a block that reject nearly all levels before the rest is read.
_FIRST_WEIGHTS = 4
_LARGEST_FLOAT16 = 65504.0
_SMALLEST_FLOAT16 = 2.0**-24


class Recovered(NamedTuple):
  """What a file can hold of a weight; numpy arrays.

  codes: int8 of the weight's shape. scale: float32 [..., last / 32], float16
  values. found: bool like the scale; where False, codes and scale are those of
  the reference rule.
  """

  codes: np.ndarray
  scale: np.ndarray
  found: np.ndarray


def recover_q4_0(
    weight: np.ndarray | jax.Array, stored_as: str
) -> Recovered:
  """Finds the codes and scales that a weight was dequantized from.

  A block is found if some float16 scale and codes dequantize to exactly its 32
  weights, once rounded to the type; the sign of a zero is ignored. Of several,
  those with the highest level for the peak are taken, then the reference rule's
  own scale, then one of bfloat16, then the middle one. Scales are positive
  unless a code is 0. A block of zeros is found, as the reference rule has it.

  Args:
    weight: [..., last], last a multiple of 32; float32 or what casts to it.
    stored_as: the type that its values were rounded to: 'float32', 'float16' or
      'bfloat16'.

  Returns:
    Codes, scales and which blocks were found.

  Raises:
    UserError: unknown type, or a last axis that is no multiple of 32.
  """
  blocks = _blocks(weight, stored_as)
  codes = np.empty(blocks.shape, np.int8)
  scale = np.empty(len(blocks), np.float32)
  found = np.empty(len(blocks), bool)
  for start in range(0, len(blocks), _CHUNK):
    part = slice(start, start + _CHUNK)
    chunk = blocks[part].astype(np.float32)
    codes[part], scale[part], found[part] = _find(chunk, stored_as)
    lost = np.flatnonzero(~found[part])
    if lost.size:
      codes[start + lost], scale[start + lost] = _reference(chunk[lost])
  shape = *weight.shape[:-1], -1
  return Recovered(
      codes.reshape(weight.shape), scale.reshape(shape), found.reshape(shape)
  )


def share_on_lattice(
    weight: np.ndarray | jax.Array, stored_as: str, samples: int = 1024
) -> float:
  """Tells from a sample of its blocks whether a weight lies on a lattice.

  Args:
    weight: as for `recover_q4_0`.
    stored_as: as for `recover_q4_0`.
    samples: how many blocks to look at, drawn with a fixed seed.

  Returns:
    The share of the sampled blocks that are found. Blocks of zeros do not
    count, they lie on every lattice; 1.0 if there are no others.

  Raises:
    UserError: as `recover_q4_0`.
  """
  blocks = _blocks(weight, stored_as)
  rng = np.random.default_rng(0)
  drawn = rng.choice(len(blocks), min(samples, len(blocks)), replace=False)
  sample = blocks[drawn].astype(np.float32)
  sample = sample[np.any(sample != 0, axis=1)]
  if not len(sample):
    return 1.0
  return float(np.mean(_find(sample, stored_as)[2]))


def _blocks(weight, stored_as):
  if stored_as not in _MISSING_BITS:
    raise errors.UserError(
        f'Weights stored as {stored_as!r} cannot be traced back to a lattice: '
        f'say one of {", ".join(_MISSING_BITS)}.'
    )
  return _Q4_0.blocks(np.asarray(weight)).reshape(-1, ggml.BLOCK)


def _reference(blocks):
  """The reference rule; always on whole chunks, so that it compiles once."""
  padding = [(0, _CHUNK - len(blocks)), (0, 0)]
  codes, scale = _Q4_0.rule(np.pad(blocks, padding))
  return np.asarray(codes)[: len(blocks)], np.asarray(scale)[: len(blocks)]


def _find(blocks, stored_as):
  """Returns codes, scales and found of blocks [n, 32]; found says which count.

  Weights of a block lie along the first axis in here: what goes over a block
  then goes over whole rows.
  """
  weights = np.ascontiguousarray(blocks.T)
  missing = _MISSING_BITS[stored_as]
  magnitude = weights.view(np.int32) & 0x7FFF_FFFF
  peak = magnitude.max(axis=0).view(np.float32)
  # Infinities and NaN are above, float32's subnormals below.
  possible = (peak >= _SMALLEST_FLOAT16) & (peak <= 8 * _LARGEST_FLOAT16)
  left = np.flatnonzero(possible)
  # A block of zeros as the reference rule has it.
  found = peak == 0
  codes = np.full(weights.shape, _Q4_0.zero, np.int8)
  scale = np.full(len(blocks), -0.0, np.float32)
  for level in range(8, 0, -1):
    near = left[_is_near(weights[:_FIRST_WEIGHTS, left], peak[left], level,
                         missing)]
    if not near.size:
      continue
    here = slice(None) if near.size == len(blocks) else near
    levels, d, fits = _explain(weights[:, here], peak[here], level, stored_as)
    codes[:, near[fits]] = levels[:, fits] + _Q4_0.zero
    scale[near[fits]] = d[fits]
    found[near[fits]] = True
    left = left[~found[left]]
  return codes.T, scale, found


def _is_near(weights, peak, level, missing):
  """Whether weights [n, blocks] may have levels if the peak has this one.

  The weight and the peak are each off by half a step of the type, at most
  2^(missing - 24) of themselves; twice that and the rounding in here.
  """
  ratio = weights * (np.float32(level) / peak)
  off = np.abs(ratio - np.rint(ratio))
  tolerance = np.float32(1.02 * 2.0 ** (missing - 23) + 2.0**-20)
  return np.all(off <= tolerance * np.abs(ratio), axis=0)


def _explain(weights, peak, level, stored_as):
  """Fits one scale to each block, its peak at the given level.

  Returns:
    Levels of d's sign [32, n], scales d and whether they explain the block.
  """
  levels = np.rint(weights * (np.float32(level) / peak))
  first, last = _candidates(weights, levels, _MISSING_BITS[stored_as])
  d = _choose(first, last)
  # Only codes below zero reach level 8: it fixes the sign. Without it both
  # signs serve: positive, as symmetric quantizers have it.
  highest, lowest = levels.max(axis=0), levels.min(axis=0)
  fits = (first <= last) & ~((highest == 8) & (lowest == -8))
  # The intervals propose, the definition decides: over float32 weights their
  # bounds are themselves rounded.
  with np.errstate(over='ignore', invalid='ignore'):
    product = (d * levels).astype(jnp.dtype(stored_as)).astype(np.float32)
  fits &= np.all(product == weights, axis=0)
  sign = np.where(highest == 8, np.float32(-1), np.float32(1))
  return levels * sign, d * sign, fits


def _candidates(weights, levels, missing):
  """Returns the first and the last float16 scale that fit, as bit patterns.

  Bit patterns of positive floats order like the floats. A bound over its level
  is rounded to float32, which moves it past no float16 number: those of which a
  multiple up to 8 is not on the bound itself are 2^-16 away or more, for types
  of 11 bits or fewer.
  """
  bits = weights.view(np.int32) & 0x7FFF_FFFF
  half = (1 << missing) >> 1
  # A tie rounds to even: an odd weight does not get the values on its bounds.
  odd = (bits >> missing) & 1 if missing else 0
  level = np.abs(levels)
  none = level == 0
  level[none] = 1
  lower = (bits - half + odd).view(np.float32) / level
  upper = (bits + half - odd).view(np.float32) / level
  lower[none] = 0
  upper[none] = np.inf
  lower, upper = lower.max(axis=0), upper.min(axis=0)
  with np.errstate(over='ignore'):
    above, below = lower.astype(np.float16), upper.astype(np.float16)
  first = above.view(np.uint16).astype(np.int32) + (above < lower)
  last = below.view(np.uint16).astype(np.int32) - (below > upper)
  return first, last


def _choose(first, last):
  """Chooses among float16 bit patterns; all of them explain the block.

  A bfloat16 value if there is one, the nearest to the middle: other files hold
  scales in bfloat16, and whoever keeps to them means them. With the peak at
  level 8 it is peak / 8, if that explains the block at all: the reference
  rule's own, under which requantizing changes nothing. Else the middle: no
  other is nearer to the unknown d at worst.
  """
  middle = (first + last) // 2
  # bfloat16 has 8 bits, float16 11 and fewer where it is subnormal.
  step = 1 << (
      (middle >= 0x100).astype(np.int32) + (middle >= 0x200) + (middle >= 0x400)
  )
  short = (middle + step // 2) // step * step
  pattern = np.where((first <= short) & (short <= last), short, middle)
  return pattern.astype(np.uint16).view(np.float16).astype(np.float32)
