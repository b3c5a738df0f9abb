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


@dataclasses.dataclass
class Recovery:
  """Counts the blocks that were found on a lattice, by weight."""

  found: dict[str, int] = dataclasses.field(default_factory=dict)
  blocks: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def share(self) -> float | None:
    """Of all blocks that were looked at; None if there were none."""
    blocks = sum(self.blocks.values())
    return sum(self.found.values()) / blocks if blocks else None

  def add(self, name: str, found: np.ndarray) -> None:
    """Counts one piece."""
    self.found[name] = self.found.get(name, 0) + int(found.sum())
    self.blocks[name] = self.blocks.get(name, 0) + found.size


def matrices(checkpoint: checkpoints.Checkpoint) -> list[str]:
  """Names the layers' matrices, in file order."""
  names = model_weights.by_layer_specs(checkpoint.config)
  return list(rules.resolve(((LAYER_MATRICES, True),), names))


def is_quantized(checkpoint: checkpoints.Checkpoint) -> bool:
  """Whether any weight is codes and scales."""
  return any(e.format for e in checkpoint.weights.entries.values())


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
    recovery: Recovery | None = None,
) -> checkpoints.Checkpoint:
  """Returns the checkpoint with weights that read as chosen.

  Args:
    checkpoint: any.
    choices: by-layer name -> format name, or 'float' for plain numbers;
      weights that are not named, and all norms, stay as they are.
    recovery: counts recovered blocks; None recovers none, as PTQ wants it.
  """
  specs = model_weights.by_layer_specs(checkpoint.config)
  entries = checkpoint.weights.entries
  for name, choice in choices.items():
    if specs[name].contraction:
      entries[name] = _choose(
          name, entries[name], choice, specs[name].contraction, recovery
      )
  return dataclasses.replace(checkpoint, weights=checkpoints.Weights(entries))


def _choose(name, entry, choice, contraction, recovery):
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
  if recovery is not None and choice == 'q4_0' and entry.format is None:
    stored_as = _FLOATS.get(entry.type)
  return entry._replace(
      type=number_format.ggml_type or choice, format=choice, raw=None,
      read=functools.partial(
          _as_codes, name, entry.read, number_format, contraction, stored_as,
          recovery,
      ),
  )


def _as_float(read, rows):
  return checkpoints.to_float32(read(rows))


def _as_codes(name, read, number_format, contraction, stored_as, recovery,
              rows):
  weight = checkpoints.to_float32(read(rows))
  rules.check_finite(name, weight)
  if stored_as and recover.share_on_lattice(weight, stored_as):
    codes, scale, found = recover.recover_q4_0(weight, stored_as)
    recovery.add(name, found)
    quantized = formats.Quantized(codes, scale)
  else:
    if stored_as:
      recovery.add(name, np.zeros(weight.size // number_format.block, bool))
    quantized = _quantize(number_format, contraction, weight)
  return checkpoints.Stored(number_format.name, quantized)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantize(number_format, contraction, weight):
  return number_format.quantize(weight, contraction)
