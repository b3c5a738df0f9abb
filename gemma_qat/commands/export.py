"""Write a trained checkpoint as GGUF, with codes and scales as trained."""

import argparse
import os
import pathlib

from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import export as export_lib


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser('gemma-qat export', description=__doc__)
  parser.add_argument('--from', dest='source', required=True,
                      metavar='CHECKPOINT',
                      help='a workdir, a step in it, or any quantized model')
  parser.add_argument('--to', required=True, metavar='FILE.gguf')
  parser.add_argument('--embedding', choices=export_lib.EMBEDDINGS,
                      help='round the embedding anew; as trained by default')
  arguments = parser.parse_args(argv)
  written = export(arguments.source, arguments.to, arguments.embedding)
  report(arguments.to, written)
  return 0


def export(
    source: str | os.PathLike,
    path: str | os.PathLike,
    embedding: str | None = None,
) -> dict[str, int]:
  """Exports what `detect.load` finds at source; see `export_lib.export`."""
  return export_lib.export(detect.load(source), path, embedding)


def report(path: str | os.PathLike, written: dict[str, int]) -> None:
  """Says what lies in a file that was just written and checked."""
  parts = ', '.join(f'{n / 1e6:.1f} MB {t}' for t, n in written.items())
  size = pathlib.Path(path).stat().st_size
  print(f'{path}: {size / 1e6:.1f} MB ({parts}), read back and equal bit for '
        'bit.')
