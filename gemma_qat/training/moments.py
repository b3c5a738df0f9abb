"""How are Adam's two moments kept between steps?

The update itself is optax's, in float32. Before and after it:
  float32: as they are, 8 bytes a weight.
  bfloat16: rounded up or down at random, 4 bytes. To nearest, changes smaller
    than half a step of 2^-8 would be lost, and with them most of what 1 - b2
    adds; at random they arrive on average.
  int8: codes in blocks of 32 along the last axis, which no shard cuts, 2.125
    bytes. See `_pack_second` and `_pack_first` for what is lost.
The random numbers follow from the count of steps and the weight's index, on
every mesh the same: a run that was stopped goes on bit for bit.
"""

import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

KINDS = ('float32', 'bfloat16', 'int8')
BLOCK = 32

# Second moments are kept as powers of 2^(-1/4) below a power of two: code 254
# is 2^-63.5 of it, the root of which is 2.8e-10.
_AN_OCTAVE = 4
_SMALLEST, _ZERO = 254, 255
# Weights of a leaf that are unpacked at once, 4 MiB in float32.
_PART = 2**20
# Not 127, so that a scale rounded to bfloat16 leaves no code above 127.
_LARGEST = 126


class Blocks(NamedTuple):
  """A moment in 8 bits: codes [..., C], bfloat16 scale [..., C / 32]."""

  codes: jax.Array
  scale: jax.Array


def scale_by_adam(
    b1: float, b2: float, epsilon: float, kind: str
) -> optax.GradientTransformation:
  """Adam whose moments are kept as one of `KINDS` says.

  The state is optax's `ScaleByAdamState`; in place of a float32 moment stands
  a bfloat16 array or `Blocks`. Kept in 8 bits is what has whole blocks and at
  least 32 rows; the rest (norm gains, most block scales) stays float32.
  """
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon)
  if kind == 'float32':
    return adam
  limit = largest_update(b1, b2)

  def pack(first, second, bits):
    if kind == 'bfloat16':
      return (_to_bfloat16(first, bits & 0xFFFF),
              _to_bfloat16(second, bits >> 16))
    if not _has_blocks(first.shape):
      return first, second
    return pack_blocks(first, second, bits, limit)

  def init(params):
    state = adam.init(params)
    zeros = lambda x: pack(x, x, jnp.zeros(x.shape, jnp.uint32))
    return state._replace(
        mu=jax.tree.map(lambda x: zeros(x)[0], state.mu),
        nu=jax.tree.map(lambda x: zeros(x)[1], state.nu),
    )

  def update_part(gradient, first, second, count, seed):
    state = optax.ScaleByAdamState(count, *_unpack(first, second))
    direction, state = adam.update(gradient, state)
    bits = random_bits(gradient.shape, seed)
    return direction, *pack(state.mu, state.nu, bits)

  def update(updates, state, params=None):
    del params
    gradients, tree = jax.tree.flatten(updates)
    leaves = zip(
        gradients, tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)
    )
    count = optax.safe_increment(state.count)
    seed, done, new = _hash(count.astype(jnp.uint32)), count, []
    for i, arrays in enumerate(leaves):
      # One leaf after the other: otherwise a compiler may unpack all of them
      # first, and hold them in float32 at once.
      arrays, _ = lax.optimization_barrier((arrays, done))
      new.append(_in_parts(
          lambda j, *part, i=i: update_part(
              *part, state.count, _hash(_hash(seed + jnp.uint32(i)) + j)
          ),
          arrays,
      ))
      done = jax.tree.leaves(new[-1][2])[-1]
    directions, first, second = (
        tree.unflatten([leaf[k] for leaf in new]) for k in range(3)
    )
    return directions, optax.ScaleByAdamState(count, first, second)

  return optax.GradientTransformation(init, update)


def largest_update(b1: float, b2: float) -> float:
  """The bound of |first moment| / root of the second, for any gradients.

  By Cauchy-Schwarz over the two sums of powers; infinite unless b1^2 < b2.
  """
  if b1**2 >= b2:
    return math.inf
  return math.sqrt((1 - b1) ** 2 / (1 - b2) / (1 - b1**2 / b2))


def pack_blocks(
    first: jax.Array, second: jax.Array, bits: jax.Array, limit: float
) -> tuple[Blocks, Blocks]:
  """Keeps both moments of one leaf in 8 bits.

  Args:
    first: float32 [..., C], C a multiple of 32.
    second: float32 [..., C], not negative.
    bits: uint32 [..., C], random.
    limit: see `largest_update`.
  """
  second = _pack_second(second, _uniform(bits >> 16))
  root = jnp.sqrt(_unpack_second(second))
  return _pack_first(first, root, limit, _uniform(bits & 0xFFFF)), second


def unpack_blocks(first: Blocks, second: Blocks) -> tuple[jax.Array, jax.Array]:
  """Returns what `pack_blocks` kept, float32."""
  values = _unpack_second(second)
  ratio = _blocks(first.codes.astype(jnp.float32)) * _wide(first.scale)
  return ratio.reshape(values.shape) * jnp.sqrt(values), values


def random_bits(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
  """Draws 32 bits an element from its index and a uint32 seed.

  A hash of the index (murmur3's last step): elementwise, so that it fuses
  with what uses it and every shard draws its own. jax.random's generator costs
  ten times the operations, and on a CPU temporaries of the leaf's size.
  """
  index = jnp.zeros(shape, jnp.uint32)
  for axis, size in enumerate(shape):
    index = index * jnp.uint32(size) + lax.broadcasted_iota(
        jnp.uint32, shape, axis
    )
  return _hash(index ^ seed)


def _pack_second(second, noise):
  """Rounds to powers of 2^(-1/4), at random between the two neighbours.

  The grid is logarithmic: a weight whose gradients are 1e9 times smaller than
  its neighbours' is known as well as they are, within 19 %, that is 9 % of the
  root and of the update. It does not move: the scale is a power of two, so
  what does not change keeps its code. At random, since 1 - b2 of a value is
  less than a step: to nearest it would never leave its code, upwards it would
  never fall. On average the stored value is the exact one; the noise that
  gathers has a relative deviation of sqrt(step / 2), 0.3 of the second moment
  or 0.15 of its root, whatever b2 is (each step adds a variance of about
  (1 - b2) step, and forgets 2 (1 - b2) of it).

  Too small a value would be dangerous: it is at most one step too small for
  one rounding; below the grid it is rounded up to the last code; and the
  update divides by the root of b2 x stored + (1 - b2) x gradient^2, which
  bounds it whatever is stored, see `_pack_first`. Only zero becomes zero.
  """
  blocks = _blocks(second)
  top = jnp.max(blocks, axis=-1, keepdims=True)
  # Above any value of the block, and exact in bfloat16.
  exponent = jnp.floor(jnp.log2(jnp.maximum(top, 2.0**-126))) + 1
  scale = _round_bfloat16(jnp.exp2(exponent))
  part = blocks / scale
  upper = jnp.clip(
      jnp.floor(-_AN_OCTAVE * jnp.log2(part)), 0, _SMALLEST - 1
  )
  above, below = _power(upper), _power(upper + 1)
  falls = _blocks(noise) < (above - part) / (above - below)
  codes = jnp.where(blocks == 0, _ZERO, upper + falls)
  return Blocks(
      codes.astype(jnp.uint8).reshape(second.shape),
      scale[..., 0].astype(jnp.bfloat16),
  )


def _unpack_second(second):
  codes = _blocks(second.codes.astype(jnp.float32))
  values = jnp.where(codes == _ZERO, 0.0, _power(codes) * _wide(second.scale))
  return values.reshape(second.codes.shape)


def _pack_first(first, root, limit, noise):
  """Keeps the ratio to the stored root of the second moment, linearly.

  That is what the update uses, and it is of one size in a block however far
  the gradients are apart: rounding costs at most 1/126 of the block's largest
  update. Exact moments keep to `limit`; the stored ones are held to it, and
  so is then every update, by the same inequality.
  """
  ratio = jnp.where(root > 0, first / jnp.where(root > 0, root, 1), 0)
  ratio = _blocks(jnp.clip(ratio, -limit, limit))
  top = jnp.max(jnp.abs(ratio), axis=-1, keepdims=True)
  scale = _round_bfloat16(top / _LARGEST)
  codes = jnp.where(scale > 0, ratio / jnp.where(scale > 0, scale, 1), 0)
  codes = jnp.clip(jnp.floor(codes + _blocks(noise)), -127, 127)
  return Blocks(
      codes.astype(jnp.int8).reshape(first.shape),
      scale[..., 0].astype(jnp.bfloat16),
  )


def _in_parts(function, arrays):
  """Computes function(part's number, *parts) -> parts, in place.

  Only one part of a large leaf is unpacked at a time. Row i of the longest
  axis but the last belongs to part i % parts: that axis may be cut over a
  mesh, and every device has its share of every part then.
  """
  axis, parts = _split(arrays[0].shape)
  if parts == 1:
    return function(jnp.uint32(0), *arrays)

  def cut(x):
    return x.reshape(*x.shape[:axis], -1, parts, *x.shape[axis + 1 :])

  def body(j, arrays):
    new = function(j.astype(jnp.uint32), *jax.tree.map(
        lambda x: lax.dynamic_index_in_dim(x, j, axis + 1, keepdims=False),
        arrays,
    ))
    return jax.tree.map(
        lambda x, part: lax.dynamic_update_index_in_dim(x, part, j, axis + 1),
        arrays, new,
    )

  new = lax.fori_loop(0, parts, body, jax.tree.map(cut, arrays))
  return jax.tree.map(lambda x, like: x.reshape(like.shape), new, arrays)


def _split(shape):
  """Finds the axis to take apart, and the fewest parts below `_PART` weights.

  A part keeps a multiple of 32 rows, for meshes to divide.
  """
  count = math.prod(shape)
  if count <= _PART or len(shape) < 2:
    return 0, 1
  axis = max(range(len(shape) - 1), key=lambda i: shape[i])
  most = shape[axis] // 32 if shape[axis] % 32 == 0 else 1
  return axis, next(
      n for n in range(1, most + 1)
      if most % n == 0 and (count // n <= _PART or n == most)
  )


def _unpack(first, second):
  if isinstance(first, Blocks):
    return unpack_blocks(first, second)
  return first.astype(jnp.float32), second.astype(jnp.float32)


def _to_bfloat16(x, bits):
  """Rounds away from zero with the probability that makes the mean exact."""
  raised = lax.bitcast_convert_type(x, jnp.uint32) + bits
  return lax.bitcast_convert_type(
      (raised >> 16).astype(jnp.uint16), jnp.bfloat16
  )


def _has_blocks(shape):
  return bool(shape) and shape[-1] % BLOCK == 0 and (
      math.prod(shape[:-1]) >= BLOCK
  )


def _blocks(x):
  return x.reshape(*x.shape[:-1], -1, BLOCK)


def _wide(scale):
  return scale.astype(jnp.float32)[..., None]


def _power(codes):
  return jnp.exp2(codes / -_AN_OCTAVE)


def _round_bfloat16(x):
  # A cast and back could be optimized away.
  return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _uniform(bits):
  return bits.astype(jnp.float32) * 2.0**-16


def _hash(x):
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
