"""Which number formats are there, and what do they make of a weight?

Weights are [..., outputs, inputs...] with the `contraction` last axes summed
over by the product. A block format cuts the last axis into blocks with a
float16 scale each; a per-channel format has one float32 scale for everything
that the product sums over. Value = scale * (code - zero), or what `decode`
says. Another format is another entry in `FORMATS`; `bf16_safe` finds the one
that keeps to a subset of its points.
"""

import dataclasses
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat import errors
from gemma_qat.quant import anchored
from gemma_qat.quant import ggml
from gemma_qat.quant import per_channel
from gemma_qat.quant import rounding
from gemma_qat.quant import sfp8
from gemma_qat.quant import straight_through


class Quantized(NamedTuple):
  """A weight as a file holds it.

  codes: int8 of the weight's shape. scale: float32, [..., last / block] of a
  block format (float16 values), contracted axes kept as 1 of a per-channel
  one.
  """

  codes: jax.Array
  scale: jax.Array


@dataclasses.dataclass(frozen=True)
class Format:
  """One number format.

  Attributes:
    name: key in `FORMATS`.
    bits_per_weight: with block scales; the float32 scale of a channel, 32 /
      row length bits more, is not counted.
    rule: the reference quantizer. For block formats [..., block] -> codes and
      scale [...]; otherwise (weight, contracted axes) -> codes and scale.
    block: weights that share a scale; None for per-channel formats.
    ggml_type: name of the type in GGUF files; None where there is none.
    lowest, highest, zero: the codes of a uniform format.
    decode: codes -> float32 in units of the scale; None for code - zero.
    pack_codes, unpack_codes: codes [n, block] <-> bytes [n, k], numpy.
    round_scale: float32 -> the block scales that are allowed, with a straight-
      through gradient.
    base: name of the format whose points include this one's; files name that
      one. None where there is none.
    anchored: whether every block has to use code 0; see `quant.anchored`.
  """

  name: str
  bits_per_weight: float
  rule: Callable[..., tuple[jax.Array, jax.Array]]
  block: int | None = None
  ggml_type: str | None = None
  lowest: int = 0
  highest: int = 0
  zero: int = 0
  decode: Callable[[jax.Array], jax.Array] | None = None
  pack_codes: Callable[[np.ndarray], np.ndarray] | None = None
  unpack_codes: Callable[[np.ndarray], np.ndarray] | None = None
  round_scale: Callable[[jax.Array], jax.Array] = rounding.round_to_float16
  base: str | None = None
  anchored: bool = False

  @property
  def stored_as(self) -> str:
    """Name of the format that codes and scales have in a file."""
    return self.base or self.name

  def quantize(self, weight: jax.Array, contraction: int = 1) -> Quantized:
    """Rounds a weight by the format's reference rule.

    Args:
      weight: float32 [..., last].
      contraction: how many trailing axes share a channel's scale.

    Returns:
      Codes and scales.

    Raises:
      UserError: the last axis is not a multiple of the block.
    """
    if self.block is None:
      axes = tuple(range(weight.ndim - contraction, weight.ndim))
      return Quantized(*self.rule(weight, axes))
    codes, scale = self.rule(self.blocks(weight))
    return Quantized(codes.reshape(weight.shape), scale)

  def dequantize(self, quantized: Quantized) -> jax.Array:
    """Returns the float32 weight that a reader of the file sees.

    Differentiable with respect to the scale, which passes through float16
    straight-through in block formats.
    """
    scale = self.stored_scale(quantized.scale)
    if self.block is None:
      return scale * self._levels(quantized.codes)
    levels = self._levels(self.blocks(quantized.codes))
    return (scale[..., None] * levels).reshape(quantized.codes.shape)

  def fake_quantize(
      self, weight: jax.Array, contraction: int = 1, is_clipped: bool = False
  ) -> jax.Array:
    """Returns dequantize(quantize(weight)); the gradient passes straight.

    Clipped: it is 0 where the weight lies more than half a step beyond the
    outermost code.
    """
    if is_clipped:
      self._check_uniform()
    return straight_through.fake_quantize(
        self, contraction, is_clipped, weight
    )

  def fake_quantize_learned(
      self, master: jax.Array, scale: jax.Array, is_clipped: bool = True
  ) -> jax.Array:
    """Rounds to a lattice whose scale is learned too (LSQ).

    Forward: `dequantize` of `codes_for(master, scale)`. Backward, per weight:
    to the master 1, or 0 where its code was clipped (1 there too unless
    `is_clipped`); to the scale level -
    master / scale, or the level alone where clipped, summed over those that
    share the scale. Source: Esser et al., Learned Step Size Quantization.

    Args:
      master: float32 [..., last].
      scale: float32 as in `Quantized`; any sign.

    Returns:
      float32 of the master's shape.

    Raises:
      UserError: the format is not uniform.
    """
    self._check_uniform()
    return straight_through.fake_quantize_learned(
        self, is_clipped, master, scale
    )

  def codes_for(self, master: jax.Array, scale: jax.Array) -> jax.Array:
    """Rounds a master to the nearest int8 codes of a given scale.

    A scale that float16 stores as 0 yields the code of zero.
    """
    self._check_uniform()
    return straight_through.nearest(self, master, scale)[0]

  def stored_scale(self, scale: jax.Array) -> jax.Array:
    """Returns the scale as files store it: through float16 in blocks."""
    return scale if self.block is None else self.round_scale(scale)

  def blocks(self, x: jax.Array) -> jax.Array:
    """Cuts the last axis: [..., last] to [..., last / block, block].

    Raises:
      UserError: the last axis is not a multiple of the block.
    """
    if x.shape[-1] % self.block:
      raise errors.UserError(
          f'{self.name} needs a last axis that is a multiple of {self.block}, '
          f'but the weight has shape {tuple(x.shape)}: choose another format '
          'for it.'
      )
    return x.reshape(*x.shape[:-1], -1, self.block)

  def pack(self, quantized: Quantized) -> np.ndarray:
    """Lays out GGUF blocks, a float16 scale and then the codes.

    Returns:
      uint8 [rows, bytes]; a row is the last axis of the weight. Where two
      axes are contracted, reshaping to fewer rows is all there is to it.

    Raises:
      UserError: GGUF has no such type.
    """
    self._check_packable()
    codes = np.asarray(quantized.codes)
    blocks = self.pack_codes(codes.reshape(-1, self.block))
    # An overflowing scale is infinite in ggml as well.
    with np.errstate(over='ignore'):
      scale = np.asarray(quantized.scale).astype(np.float16).reshape(-1, 1)
    packed = np.concatenate([scale.view(np.uint8), blocks], axis=1)
    row_bytes = codes.shape[-1] // self.block * packed.shape[1]
    return packed.reshape(-1, row_bytes)

  def unpack(self, packed: np.ndarray, shape: tuple[int, ...]) -> Quantized:
    """Undoes `pack`; takes the weight's shape; numpy arrays.

    Raises:
      UserError: GGUF has no such type, or the bytes do not fit the shape.
    """
    self._check_packable()
    count = int(np.prod(shape)) // self.block
    block_bytes = int(self.bits_per_weight * self.block / 8)
    if shape[-1] % self.block or packed.size != count * block_bytes:
      raise errors.UserError(
          f'{packed.size} bytes of {self.name} do not hold a weight of shape '
          f'{tuple(shape)}: check the tensor and its type in the file.'
      )
    blocks = np.ascontiguousarray(packed).reshape(count, -1)
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16)
    codes = self.unpack_codes(np.ascontiguousarray(blocks[:, 2:]))
    return Quantized(
        codes.reshape(shape),
        scale.astype(np.float32).reshape(*shape[:-1], -1),
    )

  def _levels(self, codes):
    if self.decode is not None:
      return self.decode(codes)
    return codes.astype(jnp.float32) - self.zero

  def _check_uniform(self):
    if self.decode is not None:
      raise errors.UserError(
          f'{self.name} has unequal steps, its scale cannot be learned: use '
          'the derived mode.'
      )

  def _check_packable(self):
    if self.ggml_type is None:
      raise errors.UserError(
          f'GGUF has no type for {self.name}: choose one of '
          f'{", ".join(f.name for f in FORMATS.values() if f.ggml_type)}.'
      )


FORMATS = {
    f.name: f
    for f in (
        Format(
            'q4_0', 4.5, ggml.q4_0, ggml.BLOCK, 'Q4_0',
            lowest=0, highest=15, zero=8,
            pack_codes=ggml.pack_q4_0, unpack_codes=ggml.unpack_q4_0,
        ),
        Format(
            'q8_0', 8.5, ggml.q8_0, ggml.BLOCK, 'Q8_0',
            lowest=-127, highest=127,
            pack_codes=ggml.pack_q8_0, unpack_codes=ggml.unpack_q8_0,
        ),
        Format(
            'int4', 4.0, per_channel.int4,
            lowest=-per_channel.INT4_MAX, highest=per_channel.INT4_MAX,
        ),
        Format('sfp8', 8.0, per_channel.sfp8, decode=sfp8.decode),
    )
}

# What config.quant.bf16_safe_scales makes of a format. Not in `FORMATS`, since
# files do not know it and nobody names it.
_BF16_SAFE = dataclasses.replace(
    FORMATS['q4_0'], name='q4_0_bf16', rule=anchored.q4_0,
    round_scale=rounding.round_to_both, base='q4_0', anchored=True,
)


def bf16_safe(format: Format) -> Format:
  """Returns the format with scales that bfloat16 holds too; others as given."""
  return _BF16_SAFE if format.name == _BF16_SAFE.base else format


def get(name: str) -> Format:
  """Returns a format by name, or a UserError that lists the names."""
  if name == _BF16_SAFE.name:
    return _BF16_SAFE
  if name not in FORMATS:
    raise errors.UserError(
        f'Unknown number format {name!r}: choose one of {", ".join(FORMATS)}.'
    )
  return FORMATS[name]
