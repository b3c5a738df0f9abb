"""How is a training run placed on machines, and watched?"""

import argparse
import os
import pathlib

import jax

from gemma_qat import hosts


def add(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that `train` and `run` share."""
  group = parser.add_argument_group('several processes')
  group.add_argument(
      '--distributed', action='store_true',
      help='this is one of several processes, found by JAX itself (Slurm, Open '
      'MPI, GKE, TPU pods)')
  group.add_argument('--coordinator', metavar='HOST:PORT',
                     help='or: the first process, reachable by all')
  group.add_argument('--num_processes', type=int, metavar='N')
  group.add_argument('--process_id', type=int, metavar='I',
                     help='from 0; the first writes reports')
  parser.add_argument(
      '--profile', type=int, default=0, metavar='STEPS',
      help='trace so many steps into WORKDIR/profile, for TensorBoard or '
      'Perfetto')


def apply(arguments: argparse.Namespace) -> None:
  """Joins the other processes; lets compiled programs be kept.

  Raises:
    UserError: see `hosts.join`.
  """
  given = (
      arguments.coordinator, arguments.num_processes, arguments.process_id
  )
  if arguments.distributed or any(x is not None for x in given):
    hosts.join(*given)
  keep_programs()


def keep_programs() -> None:
  """Lets compiled programs be kept, unless it is said where already."""
  if not jax.config.jax_compilation_cache_dir:
    base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    jax.config.update(
        'jax_compilation_cache_dir', str(pathlib.Path(base) / 'gemma_qat' / 'xla')
    )
