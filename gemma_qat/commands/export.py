"""Write a trained checkpoint with the codes and scales it was trained to."""

import argparse
import contextlib
import os
import pathlib
from typing import Callable, Iterator

import numpy as np

from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import export as export_lib
from gemma_qat.checkpoints import layouts
from gemma_qat.training import metrics

_MILLION = 1_000_000


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser('gemma-qat export', description=__doc__)
  add_arguments(parser)
  source, path, target = parse(parser, argv)
  show(export(source, path, target))
  return 0


def export(
    source: str | os.PathLike,
    path: str | os.PathLike,
    target: layouts.Target = layouts.Target(),
) -> export_lib.Exported:
  """Exports what `detect.load` finds at source; see `export_lib.export`."""
  checkpoint = detect.load(source)
  with progress(f'export {target.layout}', checkpoint) as advance:
    return export_lib.export(checkpoint, path, target, advance)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that `export` and `convert` share."""
  parser.add_argument('--from', dest='source', required=True, metavar='MODEL')
  parser.add_argument('--to', required=True, metavar='PATH',
                      help='a file for gguf and gemma_cpp, else a folder')
  parser.add_argument('--layout', default='gguf',
                      help=f'{", ".join(layouts.LAYOUTS)} (default: gguf)')
  parser.add_argument('--format', help='of the matrices; by layout: '
                      + '; '.join(f'{n}: {", ".join(l.formats)}'
                                  for n, l in layouts.LAYOUTS.items()
                                  if l.formats))
  parser.add_argument('--embedding', help='of the embedding, as it is by '
                      'default; gguf: '
                      + ', '.join(layouts.LAYOUTS['gguf'].embeddings))
  parser.add_argument('--scales', default='auto',
                      help='dtype of block scales in mlx and w4a16: auto, '
                      'bfloat16, float16, float32')
  parser.add_argument('--mmproj', default='bf16',
                      help='type of a vision tower in gguf: bf16, f16, f32, '
                      'none (default: bf16)')
  parser.add_argument('--publisher', default='',
                      help='with gguf: --to is a models folder of LM Studio, '
                      'the file goes to PUBLISHER/NAME-GGUF/ in it')
  parser.add_argument('--chat_template', default='',
                      help="'gemma' or a Jinja file, where the model has none "
                      'of its own')


def parse(parser: argparse.ArgumentParser, argv: list[str]):
  """Parses what `add_arguments` added: (source, path, target)."""
  a = parser.parse_args(argv)
  target = layouts.Target(
      a.layout, a.format, a.embedding, a.scales, a.mmproj, a.publisher,
      a.chat_template,
  )
  # Before a checkpoint is opened.
  layouts.check(target)
  return a.source, a.to, target


@contextlib.contextmanager
def progress(
    title: str, checkpoint: checkpoints.Checkpoint
) -> Iterator[Callable[[int], None]]:
  """Shows how many million weights were written; yields what counts them."""
  entries = checkpoint.weights.entries.values()
  total = sum(int(np.prod(e.shape, dtype=np.int64)) for e in entries)
  done = 0
  with metrics.Progress(title, total // _MILLION) as bar:

    def advance(count):
      nonlocal done
      millions = (done + count) // _MILLION - done // _MILLION
      done += count
      if millions:
        bar.advance(millions, 'million weights')

    yield advance


def show(exported: export_lib.Exported) -> None:
  """Says what was written, and what rounding changed."""
  for path in exported.paths:
    print(f'{path}: {_size(path) / 1e6:,.1f} MB')
  held = ', '.join(f'{n / 1e6:,.1f} MB {t}'
                   for t, n in exported.num_bytes.items())
  print(f'Tensors: {held}; read back and equal to what was written.')
  rounding = exported.rounding
  if rounding.share is not None:
    print(f'{rounding.share:.2%} of the blocks of plain numbers lay on a Q4_0 '
          'lattice and were recovered.')
  if rounding.change.count:
    print(f'Rounded to codes by the reference rule: {rounding.change}.')
  print('The numbers in the files against those meant for them:')
  for line in (*exported.changes.lines(), *exported.notes):
    print(f'  {line}')


def _size(path: pathlib.Path) -> int:
  if path.is_dir():
    return sum(p.stat().st_size for p in path.rglob('*') if p.is_file())
  return path.stat().st_size
