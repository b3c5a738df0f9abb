"""How does a checkpoint become the file or folder that a runtime loads?

Codes and scales are written as they are; nothing here rounds a trained lattice
a second time where the target can hold it, and what changes is counted. What
was written is read back and compared before it gets its name.
"""

import dataclasses
import os
import pathlib
from typing import Callable, Mapping, NamedTuple

from gemma_qat import errors
from gemma_qat.checkpoints import changes
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import layouts
from gemma_qat.checkpoints import prepare
from gemma_qat.data import chat
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import formats
from gemma_qat.quant import rules

# Fewer blocks than this on a lattice: the checkpoint was not trained for one.
_LEAST_ON_LATTICE = 0.5


class Exported(NamedTuple):
  """paths: what was written. num_bytes: of tensors by type. changes: what the
  file could not hold of the numbers meant for it. rounding: how those came to
  be, where plain weights became codes. notes: more lines for people."""

  paths: tuple[pathlib.Path, ...]
  num_bytes: dict[str, int]
  changes: changes.Changes
  rounding: prepare.Rounding
  notes: tuple[str, ...]


def export(
    checkpoint: checkpoints.Checkpoint,
    path: str | os.PathLike,
    target: layouts.Target = layouts.Target(),
    on_weights: Callable[[int], None] = lambda count: None,
) -> Exported:
  """Writes a trained checkpoint with the numbers that it was trained to.

  Args:
    checkpoint: one whose matrices are codes and scales, or lie on a Q4_0
      lattice, which is then recovered.
    path: the file or folder.
    target: layout and formats.
    on_weights: called with the count of every piece of weights written.

  Raises:
    UserError: nothing in the checkpoint is quantized, a format that the
      layout does not have, or the target cannot be written.
  """
  if not prepare.is_quantized(checkpoint):
    share = prepare.lattice_share(checkpoint)
    if share < _LEAST_ON_LATTICE:
      raise errors.UserError(
          f'{checkpoint.source} holds no quantized weights to export, and only '
          f'{share:.1%} of its blocks lie on a Q4_0 lattice: use '
          "'gemma-qat quantize' for a file without training, or 'gemma-qat "
          "convert' for another layout."
      )
    if target.layout == 'gguf' and target.format is None:
      target = dataclasses.replace(target, format='q4_0')
  return convert(checkpoint, path, target, on_weights)


def convert(
    checkpoint: checkpoints.Checkpoint,
    path: str | os.PathLike,
    target: layouts.Target,
    on_weights: Callable[[int], None] = lambda count: None,
    recover: bool = True,
) -> Exported:
  """Writes any checkpoint in any layout; see `export` for the arguments.

  Args:
    recover: whether plain weights on a Q4_0 lattice get their own codes and
      scales back; without, the reference rule rounds them.
  """
  layouts.check(target)
  if target.chat_template:
    checkpoint = _with_turns(checkpoint, chat.template(target.chat_template))
  _check_turns(checkpoint)
  rounding, counted = prepare.Rounding(), changes.Changes()
  prepared = prepare.prepare(
      checkpoint, layouts.choices(checkpoint, target), rounding, recover
  )
  written = layouts.get(target.layout).write(
      prepared, pathlib.Path(path), target,
      lambda *piece: on_weights(counted.add(*piece)),
  )
  return Exported(
      written.paths, written.num_bytes, counted, rounding, written.notes
  )


def quantize(
    checkpoint: checkpoints.Checkpoint,
    path: str | os.PathLike,
    choices: Mapping[str, str],
) -> dict[str, int]:
  """Writes a GGUF rounded by the formats' reference rules: PTQ.

  Args:
    checkpoint: any.
    path: the GGUF file.
    choices: by-layer name -> format name, or 'f16'.

  Returns:
    Bytes of tensor data by GGUF type.

  Raises:
    UserError: a format has no GGUF type, or the file cannot be written.
  """
  floats = {n: f for n, f in choices.items() if f not in formats.FORMATS}
  prepared = prepare.prepare(
      checkpoint, {**choices, **{n: 'float' for n in floats}},
      recover_lattices=False,
  )
  return layouts.save_gguf(prepared, path, floats)


def save_float(
    checkpoint: checkpoints.Checkpoint,
    path: str | os.PathLike,
    float_type: str = 'bf16',
) -> dict[str, int]:
  """Writes a GGUF, every matrix as `float_type`: 'f32', 'f16' or 'bf16'."""
  names = model_weights.by_layer_specs(checkpoint.config)
  prepared = prepare.prepare(checkpoint, {n: 'float' for n in names})
  return layouts.save_gguf(prepared, path, {n: float_type for n in names})


def uniform_choices(
    checkpoint: checkpoints.Checkpoint, matrices: str, embedding: str
) -> dict[str, str]:
  """The choices that give all matrices one format, the embedding another."""
  names = model_weights.by_layer_specs(checkpoint.config)
  return rules.resolve(
      ((prepare.LAYER_MATRICES, matrices), ('^embedding$', embedding)), names
  )


def _check_turns(checkpoint):
  """Refuses a template whose turns a runtime could not tell from text."""
  tokenizer = checkpoint.tokenizer
  if tokenizer is None or not tokenizer.chat_template:
    return
  for piece in (chat.TURN_BEGINS, chat.TURN_ENDS):
    if piece in tokenizer.chat_template and (
        tokenizer.encode(piece, specials=True).size != 1
    ):
      raise errors.UserError(
          f'{checkpoint.source} has a chat template that writes {piece}, but '
          'no such token: answers would never end. Give it the tokenizer that '
          'it was trained with.'
      )


def _with_turns(checkpoint, template):
  """The checkpoint as one that answers turns; its tokenizer alone changes."""
  tokenizer = checkpoints.tokenizer(checkpoint)
  if tokenizer.end_of_turn_id is None:
    raise errors.UserError(
        f'{checkpoint.source} has no token <end_of_turn>: a chat template '
        'needs it.'
    )
  return dataclasses.replace(checkpoint, tokenizer=dataclasses.replace(
      tokenizer, chat_template=template, eos_id=tokenizer.end_of_turn_id
  ))
