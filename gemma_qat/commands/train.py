"""Train a student; go on by itself where the workdir stands."""

import argparse
import pathlib

from gemma_qat.commands import config_flags
from gemma_qat.training import loop


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser('gemma-qat train', description=__doc__)
  parser.add_argument('--workdir', required=True, type=pathlib.Path,
                      help='receives checkpoints and metrics')
  arguments, config = config_flags.parse(parser, argv)
  step = loop.train(config, arguments.workdir)
  print(f'Step {step} lies in {arguments.workdir}/checkpoints/{step}.')
  return 0
