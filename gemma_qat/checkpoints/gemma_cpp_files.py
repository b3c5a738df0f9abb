"""How does a model go into the one file that gemma.cpp loads, in SFP8?

Tensors, sizes, tokenizer and table of tensors are blobs of one container.
Unlike our per-channel format, gemma.cpp has one scale a tensor, and that only
where a tensor holds more than 1.875. No public package loads the result:
what is known of the format was read in gemma.cpp's source. There, positions
of global layers are not divided by 8, as 4B and larger were trained with.
"""

from collections.abc import Callable, Iterator
import collections
import functools
import os
import zlib

import jax
import ml_dtypes
import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import atomic
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import gemma_cpp_fields
from gemma_qat.checkpoints import gemma_cpp_tensors
from gemma_qat.checkpoints import sbs_blobs
from gemma_qat.quant import sfp8

# The blobs that are no tensors.
CONFIG, TOKENIZER, TABLE = 'config', 'tokenizer', 'toc'

OnPiece = Callable[[str, np.ndarray, np.ndarray], None]


def save(
    path: str | os.PathLike,
    checkpoint: checkpoints.Checkpoint,
    on_piece: OnPiece | None = None,
    custom: bool = False,
) -> dict[str, int]:
  """Writes a checkpoint for gemma.cpp and reads the file back.

  Nothing larger than a piece of a weight is in memory. The tower of 4B and
  larger goes along where the checkpoint has it; else gemma.cpp is told that
  the model is of text only. Prompts are wrapped in turns if the tokenizer has
  a chat template or there is a tower.

  Args:
    path: the file (.sbs); replaced if it exists.
    checkpoint: any.
    on_piece: called with name, written and given float32 values of each piece
      of the text model, so that the caller can sum up what SFP8 changed.
    custom: let gemma.cpp rely on the sizes in the file alone, so that any
      can be written, as in tests.

  Returns:
    Bytes of tensor data by type: 'SFP', 'BF16', 'F32'.

  Raises:
    UserError: gemma.cpp cannot run such a model, there is no tokenizer or one
      of another size, values are not finite, or the disk refuses.
  """
  tokenizer = checkpoints.tokenizer(checkpoint)
  config = checkpoint.config
  if tokenizer.vocab_size != config.vocab_size:
    raise errors.UserError(
        f'The tokenizer has {tokenizer.vocab_size:,} tokens, the model '
        f'{config.vocab_size:,}: give the tokenizer of this model.'
    )
  vision = checkpoint.vision
  sizes = gemma_cpp_fields.words(gemma_cpp_fields.model(
      config, vision.config if vision else None,
      tokenizer.chat_template is not None, custom,
  ))
  table: list[gemma_cpp_fields.Tensor] = []

  def blobs():
    yield from _tensors(checkpoint, on_piece, table)
    yield CONFIG, [sizes]
    yield TOKENIZER, [tokenizer.to_proto()]
    # Last, for now the scales are known.
    yield TABLE, [gemma_cpp_fields.table(table)]

  with atomic.whole_file(path) as temporary:
    written = sbs_blobs.write(temporary, blobs())
    _verify(path, temporary, written, table)
  counted = collections.Counter()
  for tensor in table:
    counted[tensor.type] += tensor.num_bytes
  return dict(counted)


def read_tensors(
    path: str | os.PathLike,
) -> dict[str, tuple[gemma_cpp_fields.Tensor, sbs_blobs.Blob]]:
  """Says what tensors a file holds, by gemma.cpp's names, and where they lie.

  Raises:
    UserError: not an .sbs file, or it is damaged.
  """
  blobs = sbs_blobs.read(path)
  if TABLE not in blobs:
    raise errors.UserError(
        f'{path} has no table of tensors: it is no .sbs file of 2025 or later.'
    )
  data = sbs_blobs.read_bytes(path, blobs[TABLE])
  with errors.about(path):
    table = gemma_cpp_fields.read_table(data)
  for name, tensor in table.items():
    if name not in blobs or blobs[name].num_bytes != tensor.num_bytes:
      raise errors.UserError(
          f'{path} is damaged, {name} is not there with {tensor.num_bytes:,} '
          'bytes: export it again.'
      )
  return {name: (tensor, blobs[name]) for name, tensor in table.items()}


def _tensors(checkpoint, on_piece, table):
  """Yields name and encoded chunks of each tensor; fills the table."""
  plans = [(checkpoint.weights, t, on_piece)
           for t in gemma_cpp_tensors.text(checkpoint.config)]
  if checkpoint.vision:
    plans += [(checkpoint.vision.weights, t, None)
              for t in gemma_cpp_tensors.vision(checkpoint.vision.config)]
  for weights, planned, report in plans:
    values = functools.partial(
        gemma_cpp_tensors.values, weights, planned, checkpoint.source
    )
    scale = np.float32(1)
    if planned.type == 'SFP':
      # The scale of the whole comes before its first byte: a pass of its own.
      scale = sfp8.tensor_scale(max(np.abs(v).max() for _, v in values()))
    table.append(planned.described(float(scale)))
    yield planned.name, _encoded(values(), planned.type, scale, report)


def _encoded(values, kind, scale, report) -> Iterator[np.ndarray]:
  for name, given in values:
    if kind == 'SFP':
      stored = np.asarray(_encode(given / scale))
    elif kind == 'BF16':
      stored = given.astype(ml_dtypes.bfloat16)
    else:
      stored = given
    if report is not None:
      report(name, _decoded(stored, kind, scale), given)
    yield np.ascontiguousarray(stored).reshape(-1).view(np.uint8)


def _decoded(stored, kind, scale):
  if kind == 'SFP':
    return np.asarray(_decode(stored)) * scale
  return stored.astype(np.float32)


def _verify(path, temporary, written, table):
  """Reads the file back: its structure, its table and the sum of each blob."""
  found = read_tensors(temporary)
  blobs = sbs_blobs.read(temporary)
  if [t for t, _ in found.values()] != table or list(blobs) != list(written):
    raise errors.UserError(
        f'{path} did not come back with the tensors that were written: the '
        'disk is damaged, export it elsewhere.'
    )
  for key, expected in written.items():
    crc = 0
    for chunk in sbs_blobs.chunks(temporary, blobs[key]):
      crc = zlib.crc32(chunk, crc)
    if sbs_blobs.Written(blobs[key].num_bytes, crc) != expected:
      raise errors.UserError(
          f'{path}: {key} does not hold the bytes that were to be written: '
          'the disk is damaged, export it elsewhere.'
      )


_encode = jax.jit(sfp8.encode)
_decode = jax.jit(sfp8.decode)
