"""Train a student; go on by itself where the workdir stands."""

import argparse
import pathlib

from gemma_qat import hosts
from gemma_qat.commands import config_flags
from gemma_qat.commands import job_flags
from gemma_qat.training import loop


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser('gemma-qat train', description=__doc__)
  parser.add_argument('--workdir', required=True, type=pathlib.Path,
                      help='receives checkpoints and metrics')
  job_flags.add(parser)
  arguments, config = config_flags.parse(parser, argv)
  job_flags.apply(arguments)
  step = loop.train(config, arguments.workdir, arguments.profile)
  if hosts.is_first():
    print(f'Step {step} lies in {arguments.workdir}/checkpoints/{step}.')
  return 0
