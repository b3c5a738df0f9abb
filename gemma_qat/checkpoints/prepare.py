"""In which format does each weight leave, and how does it get there?

What is in that format already stays as it is, bit for bit. A plain weight that
lies on a Q4_0 lattice is given back its codes and scales; another one is
rounded by the format's reference rule.
"""

import dataclasses
import functools
from typing import Mapping

import jax
import numpy as np

from gemma_qat.checkpoints import changes
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import formats
from gemma_qat.quant import recover
from gemma_qat.quant import rules

# Which matrices have a format, as config.quant.rules would say it.
LAYER_MATRICES = r'(attn_[qkvo]|mlp_(gate|up|down))$'

# As the layouts call them -> as `recover` does. What else there is (Q4_K ...)
# has no lattice to be found.
_FLOATS = {
    'F32': 'float32', 'float32': 'float32', 'F16': 'float16',
    'float16': 'float16', 'BF16': 'bfloat16', 'bfloat16': 'bfloat16',
}
_PROBED = 6


class Rounding:
  """Counts what happens to weights that become codes, as they are read.

  A writer may read a piece twice (to learn its largest value, say): it counts
  once.
  """

  def __init__(self):
    self._pieces = {}

  @property
  def blocks(self) -> int:
    """Blocks of plain numbers in which a lattice was looked for."""
    return sum(blocks for _, blocks, _ in self._pieces.values())

  @property
  def found(self) -> int:
    """Those of them that lay on one."""
    return sum(found for found, _, _ in self._pieces.values())

  @property
  def share(self) -> float | None:
    """Recovered of all blocks looked at; None if there were none."""
    return self.found / self.blocks if self.blocks else None

  @property
  def change(self) -> changes.Change:
    """What the reference rule did to all weights that it rounded."""
    total = changes.Change()
    for _, _, change in self._pieces.values():
      total.join(change)
    return total

  def add(
      self, name: str, rows: slice, found: int, blocks: int,
      change: changes.Change,
  ) -> None:
    """Counts a piece."""
    self._pieces[name, rows.start, rows.stop] = found, blocks, change


def matrices(checkpoint: checkpoints.Checkpoint) -> list[str]:
  """Names the layers' matrices, in file order."""
  names = model_weights.by_layer_specs(checkpoint.config)
  return list(rules.resolve(((LAYER_MATRICES, True),), names))


def is_quantized(checkpoint: checkpoints.Checkpoint) -> bool:
  """Whether any matrix of a layer is codes and scales."""
  entries = checkpoint.weights.entries
  return any(entries[name].format for name in matrices(checkpoint))


def float_type(entry: checkpoints.Entry) -> str:
  """Returns 'float32', 'float16' or 'bfloat16': what holds a plain weight.

  Of foreign types (Q4_K ...) bfloat16, as the checkpoints they came from.
  """
  return _FLOATS.get(entry.type, 'bfloat16')


def lattice_share(checkpoint: checkpoints.Checkpoint) -> float:
  """Looks at some layer matrices: which share of blocks lies on a lattice?

  Codes and scales count as 1; see `recover.share_on_lattice` for the rest.
  """
  names = matrices(checkpoint)
  probed = names[:: max(1, len(names) // _PROBED)]
  shares = []
  for name in probed:
    entry = checkpoint.weights.entries[name]
    if entry.format is not None:
      shares.append(float(entry.format == 'q4_0'))
    elif entry.type not in _FLOATS:
      shares.append(0.0)
    else:
      _, piece = next(checkpoint.weights.pieces(name))
      shares.append(recover.share_on_lattice(piece, _FLOATS[entry.type]))
  return float(np.mean(shares))


def prepare(
    checkpoint: checkpoints.Checkpoint,
    choices: Mapping[str, str],
    rounding: Rounding | None = None,
    recover_lattices: bool = True,
) -> checkpoints.Checkpoint:
  """Returns the checkpoint with weights that read as chosen.

  Args:
    checkpoint: any.
    choices: by-layer name -> format name, or 'float' for plain numbers;
      weights that are not named, and all norms, stay as they are.
    rounding: counts what is recovered and what rounded.
    recover_lattices: False rounds everything by the reference rule, as PTQ
      wants it.
  """
  rounding = Rounding() if rounding is None else rounding
  specs = model_weights.by_layer_specs(checkpoint.config)
  entries = checkpoint.weights.entries
  for name, choice in choices.items():
    if specs[name].contraction:
      entries[name] = _choose(
          name, entries[name], choice, specs[name].contraction, rounding,
          recover_lattices,
      )
  return dataclasses.replace(checkpoint, weights=checkpoints.Weights(entries))


def _choose(name, entry, choice, contraction, rounding, recover_lattices):
  if choice == 'float':
    if entry.format is None and entry.raw is None:
      return entry
    return entry._replace(
        type=float_type(entry), format=None, raw=None,
        read=functools.partial(_as_float, entry.read),
    )
  number_format = formats.get(choice)
  if entry.format == number_format.name:
    return entry
  stored_as = None
  if recover_lattices and choice == 'q4_0' and entry.format is None:
    stored_as = _FLOATS.get(entry.type)
  return entry._replace(
      type=number_format.ggml_type or choice, format=choice, raw=None,
      read=functools.partial(
          _as_codes, name, entry.read, number_format, contraction, stored_as,
          rounding,
      ),
  )


def _as_float(read, rows):
  return checkpoints.to_float32(read(rows))


def _as_codes(name, read, number_format, contraction, stored_as, rounding,
              rows):
  weight = checkpoints.to_float32(read(rows))
  rules.check_finite(name, weight)
  found = np.zeros(0, bool)
  if stored_as and recover.share_on_lattice(weight, stored_as):
    codes, scale, found = recover.recover_q4_0(weight, stored_as)
    quantized = formats.Quantized(codes, scale)
  else:
    quantized = _quantize(number_format, contraction, weight)
  stored = checkpoints.Stored(number_format.name, quantized)
  change = changes.Change()
  blocks = weight.size // number_format.block if stored_as else 0
  if not found.size or not found.all():
    seen = checkpoints.to_float32(stored)
    if found.size:
      # Of the recovered blocks the lattice counts, not its rounded floats.
      lost = ~np.repeat(found.reshape(-1), number_format.block)
      seen, weight = seen.reshape(-1)[lost], weight.reshape(-1)[lost]
    change.compare(seen, weight)
  rounding.add(name, rows, int(found.sum()), blocks, change)
  return stored


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantize(number_format, contraction, weight):
  return number_format.quantize(weight, contraction)
