"""Write any model in another layout: nothing is rounded that need not be."""

import argparse
import os

from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import export as export_lib
from gemma_qat.checkpoints import layouts
from gemma_qat.commands import export as export_command


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser('gemma-qat convert', description=__doc__)
  export_command.add_arguments(parser)
  source, path, target = export_command.parse(parser, argv)
  export_command.show(convert(source, path, target))
  return 0


def convert(
    source: str | os.PathLike,
    path: str | os.PathLike,
    target: layouts.Target,
) -> export_lib.Exported:
  """Converts what `detect.load` finds at source; see `export_lib.convert`."""
  checkpoint = detect.load(source)
  title = f'convert to {target.layout}'
  with export_command.progress(title, checkpoint) as advance:
    return export_lib.convert(checkpoint, path, target, advance)
