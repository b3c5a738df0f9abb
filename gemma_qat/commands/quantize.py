"""Write a GGUF rounded by the reference rule, without training (PTQ)."""

import argparse
import os

from gemma_qat import errors
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import export as export_lib
from gemma_qat.commands import export as export_command
from gemma_qat.quant import formats

_FLOATS = ('f16', 'bf16', 'f32')


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser('gemma-qat quantize', description=__doc__)
  parser.add_argument('--from', dest='source', required=True,
                      metavar='CHECKPOINT')
  parser.add_argument('--to', required=True, metavar='FILE.gguf')
  parser.add_argument('--format', required=True,
                      help='of the matrices: q4_0, q8_0; or f16, bf16, f32 for '
                      'a file that is not quantized')
  parser.add_argument('--embedding', choices=export_lib.EMBEDDINGS,
                      default='q8_0', help='(default: q8_0)')
  arguments = parser.parse_args(argv)
  written = quantize(
      arguments.source, arguments.to, arguments.format, arguments.embedding
  )
  export_command.report(arguments.to, written)
  return 0


def quantize(
    source: str | os.PathLike,
    path: str | os.PathLike,
    format: str,
    embedding: str = 'q8_0',
) -> dict[str, int]:
  """Quantizes what `detect.load` finds at source.

  Raises:
    UserError: a format that GGUF does not know, or no such checkpoint.
  """
  known = [f.name for f in formats.FORMATS.values() if f.ggml_type]
  if format not in (*known, *_FLOATS):
    raise errors.UserError(
        f'Unknown format {format!r}: choose one of '
        f'{", ".join((*known, *_FLOATS))}.'
    )
  checkpoint = detect.load(source)
  if format in _FLOATS:
    return export_lib.save_float(checkpoint, path, format)
  choices = export_lib.uniform_choices(checkpoint, format, embedding)
  return export_lib.quantize(checkpoint, path, choices)
