"""How are Adam's two moments kept between steps?

The update itself is optax's, in float32. Before and after it:
  float32: as they are, 8 bytes a weight.
  bfloat16: rounded up or down at random, 4 bytes. To nearest, changes smaller
    than half a step of 2^-8 would be lost, and with them most of what 1 - b2
    adds; at random they arrive on average.
  int8: codes in blocks of 32 along the last axis, which no shard cuts, 2.1
    bytes; `eight_bits` says what is lost.
The random numbers follow from the count of steps and the weight's index, on
every mesh the same: a run that was stopped goes on bit for bit.
"""

import math

import jax
from jax import lax
import jax.numpy as jnp
import optax

from gemma_qat.training import eight_bits

KINDS = ('float32', 'bfloat16', 'int8')

# Weights of a leaf that are unpacked at once, 16 MiB in float32.
_PART = 2**22


def scale_by_adam(
    b1: float, b2: float, epsilon: float, kind: str
) -> optax.GradientTransformation:
  """Adam whose moments are kept as one of `KINDS` says.

  The state is optax's `ScaleByAdamState`; in place of a float32 moment stands
  a bfloat16 array or `eight_bits.Blocks`. Leaves that have no blocks (norm
  gains, most block scales) stay float32 in place of int8.
  """
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon)
  if kind == 'float32':
    return adam
  limit = eight_bits.largest_update(b1, b2)

  def pack(first, second, bits):
    if kind == 'bfloat16':
      return (_to_bfloat16(first, bits & 0xFFFF),
              _to_bfloat16(second, bits >> 16))
    if not eight_bits.has_blocks(first.shape):
      return first, second
    return eight_bits.pack(first, second, bits, limit)

  def zeros(x):
    if kind == 'bfloat16':
      return 2 * (jnp.zeros_like(x, jnp.bfloat16),)
    return eight_bits.zeros(x.shape) if eight_bits.has_blocks(x.shape) else (
        x, x
    )

  def init(params):
    state = adam.init(params)
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


def random_bits(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
  """Draws 32 bits an element from its index and a uint32 seed.

  A hash of the index (murmur3's last step): elementwise, so that it fuses
  with what uses it, and every shard draws its own, the same on every mesh.
  """
  index = jnp.zeros(shape, jnp.uint32)
  for axis, size in enumerate(shape):
    index = index * jnp.uint32(size) + lax.broadcasted_iota(
        jnp.uint32, shape, axis
    )
  return _hash(index ^ seed)


def _in_parts(function, arrays):
  """Computes function(part's number, *parts) -> parts, one after the other.

  Only one part of a large leaf is unpacked at a time. Row i of the longest
  axis but the last belongs to part i % parts: that axis may be cut over a
  mesh, and every device has its share of every part then.
  """
  axis, parts = _split(arrays[0].shape)
  if parts == 1:
    return function(jnp.uint32(0), *arrays)
  cut = lambda x: x.reshape(*x.shape[:axis], -1, parts, *x.shape[axis + 1 :])
  arrays, like = jax.tree.map(cut, arrays), arrays

  def body(j, new):
    # Read once, by the barrier, not by everything that is made of it.
    part = lax.optimization_barrier(jax.tree.map(
        lambda x: lax.dynamic_index_in_dim(x, j, axis + 1, keepdims=False),
        arrays,
    ))
    return jax.tree.map(
        lambda x, y: lax.dynamic_update_index_in_dim(x, y, j, axis + 1),
        new, function(j.astype(jnp.uint32), *part),
    )

  # The results are as the arguments, but not in their place: there, XLA copied
  # the whole leaf for every part. What they are filled with at first does not
  # matter; zeros, which wait for nothing, would be held from the beginning of
  # the whole step: 23 GB at 4B.
  gradient = arrays[0]
  room = jax.tree.map(
      lambda x: gradient.astype(x.dtype) if x.shape == gradient.shape
      else jnp.zeros_like(x), arrays,
  )
  new = lax.fori_loop(0, parts, body, room)
  return jax.tree.map(lambda x, y: x.reshape(y.shape), new, like)


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
  if isinstance(first, eight_bits.Blocks):
    return eight_bits.unpack(first, second)
  return first.astype(jnp.float32), second.astype(jnp.float32)


def _to_bfloat16(x, bits):
  """Rounds away from zero with the probability that makes the mean exact."""
  raised = lax.bitcast_convert_type(x, jnp.uint32) + bits
  return lax.bitcast_convert_type(
      (raised >> 16).astype(jnp.uint16), jnp.bfloat16
  )


def _hash(x):
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
