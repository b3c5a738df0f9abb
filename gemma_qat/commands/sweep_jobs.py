"""How do several commands run side by side on this machine?

Each is a process of its own that writes a log. It gets a share of the CPUs by
affinity, from which XLA, OpenMP and llama.cpp take the number of their threads,
and, where there are NVIDIA GPUs, a share of those.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys
import time
from typing import Any

from gemma_qat import errors
from gemma_qat.training import stopping

_GPUS = 'CUDA_VISIBLE_DEVICES'
# Seconds between two looks at what runs.
_TICK = 0.1


@dataclasses.dataclass(frozen=True)
class Job:
  """A command and where its output goes."""

  name: str
  command: tuple[str, ...]
  log: pathlib.Path


class StopSignal(stopping.Counter):
  """Counts SIGTERM and Ctrl-C, so that children can be stopped in turn."""

  def __init__(self):
    # Not by `hosts`, which asks JAX for devices that the children need.
    super().__init__(lambda times: print(
        'Stopping, as soon as every point has saved its step ...'
        if times == 1 else 'Stopping at once.',
        file=sys.stderr, flush=True,
    ))


def run(
    jobs: Sequence[Job],
    parallel: int,
    stop: StopSignal,
    on_wait: Callable[[list[str]], None] = lambda names: None,
) -> Iterator[tuple[str, int]]:
  """Runs commands, some at a time; yields (name, exit code) as they end.

  Args:
    jobs: in the order in which they begin.
    parallel: how many at a time.
    stop: once it is asked no further job begins, and those that run get
      SIGTERM, each time it is asked.
    on_wait: is called with the names of those that run.

  Raises:
    UserError: there are fewer GPUs than jobs at a time.
  """
  places = _places(min(parallel, len(jobs)))
  waiting, running, told = list(jobs), {}, 0
  try:
    while waiting and not stop.asked or running:
      while waiting and len(running) < len(places) and not stop.asked:
        place = min(set(range(len(places))) - {p for p, _ in running.values()})
        job = waiting.pop(0)
        running[job.name] = place, start(job, *places[place])
      if stop.asked > told:
        told = stop.asked
        for _, process in running.values():
          process.terminate()
      on_wait(list(running))
      time.sleep(_TICK)
      for name, (_, process) in list(running.items()):
        code = process.poll()
        if code is not None:
          del running[name]
          yield name, code
  finally:
    # Only where something went wrong here: the children need not.
    for _, process in running.values():
      process.terminate()


def start(
    job: Job, cpus: Sequence[int] = (), gpus: Sequence[str] = ()
) -> subprocess.Popen:
  """Starts one command; its output goes to the end of its log.

  Args:
    job: the command.
    cpus: those that it may use; none given: all of this process.
    gpus: the same of GPUs, as in CUDA_VISIBLE_DEVICES.
  """
  environment = dict(os.environ)
  if gpus:
    environment[_GPUS] = ','.join(gpus)
  job.log.parent.mkdir(parents=True, exist_ok=True)
  with open(job.log, 'a', encoding='utf-8') as log:
    print('$', shlex.join(job.command), file=log, flush=True)
    process = subprocess.Popen(
        job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        env=environment,
        # The terminal's Ctrl-C is for us, who pass it on once.
        process_group=0,
    )
  if cpus:
    # In time: threads are made after Python's imports and inherit this.
    try:
      os.sched_setaffinity(process.pid, cpus)
    except ProcessLookupError:
      pass  # It has ended already.
  return process


def shares(things: Sequence[Any], count: int) -> list[tuple[Any, ...]]:
  """Parts things into neighbours, as equal as can be; no part is empty.

  Where there are fewer things than parts, several parts get the same one.
  """
  n = len(things)
  if n < count:
    return [(things[i % n],) for i in range(count)]
  cuts = [i * n // count for i in range(count + 1)]
  return [tuple(things[a:b]) for a, b in zip(cuts, cuts[1:])]


def _places(count):
  """The (CPUs, GPUs) of each job at a time; empty: all there are."""
  if count < 2:
    return [((), ())] * count
  cpus = [()] * count
  if hasattr(os, 'sched_setaffinity'):
    cpus = shares(sorted(os.sched_getaffinity(0)), count)
  gpus = _gpus()
  if gpus and len(gpus) < count:
    raise errors.UserError(
        f'--parallel={count}: there are {len(gpus)} GPUs, and a process takes '
        f'most of the memory of its own: give --parallel={len(gpus)}.'
    )
  return list(zip(cpus, shares(gpus, count) if gpus else [()] * count))


def _gpus():
  """The NVIDIA GPUs that this process may use, without opening them."""
  if _GPUS in os.environ:
    return [g for g in os.environ[_GPUS].split(',') if g]
  found = pathlib.Path('/proc/driver/nvidia/gpus')
  return [str(i) for i in range(len(list(found.glob('*'))))]
