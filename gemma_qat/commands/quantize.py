"""Write a GGUF rounded by the reference rule, without training (PTQ)."""

import argparse
import os

from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import export as export_lib
from gemma_qat.checkpoints import layouts
from gemma_qat.commands import export as export_command

_FLOATS = ('f16', 'bf16', 'f32')


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser('gemma-qat quantize', description=__doc__)
  parser.add_argument('--from', dest='source', required=True,
                      metavar='CHECKPOINT')
  parser.add_argument('--to', required=True, metavar='FILE.gguf')
  parser.add_argument('--format', required=True,
                      help='of the matrices: q4_0, q8_0; or f16, bf16, f32 for '
                      'a file that is not quantized')
  parser.add_argument('--embedding', default='q8_0',
                      help='q8_0 (default), q4_0, q6_k, f16 ...')
  arguments = parser.parse_args(argv)
  export_command.show(quantize(
      arguments.source, arguments.to, arguments.format, arguments.embedding
  ))
  return 0


def quantize(
    source: str | os.PathLike,
    path: str | os.PathLike,
    format: str,
    embedding: str = 'q8_0',
) -> export_lib.Exported:
  """Quantizes what `detect.load` finds at source.

  Raises:
    UserError: a format that GGUF does not know, or no such checkpoint.
  """
  if format in _FLOATS:
    embedding = format
  target = layouts.Target('gguf', format, embedding)
  layouts.check(target)
  checkpoint = detect.load(source)
  with export_command.progress('quantize', checkpoint) as advance:
    return export_lib.convert(
        checkpoint, path, target, advance, recover=False
    )
