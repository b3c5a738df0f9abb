"""How do several commands run on a cluster?

By submitit, which turns them into one job array of Slurm, or into processes of
this machine to try that out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import pathlib
import time
from typing import Any

from gemma_qat import errors
from gemma_qat.commands import sweep_jobs

EXECUTORS = ('local', 'slurm', 'debug')
# A day; submitit's own few minutes are for functions.
_MINUTES = 24 * 60
_TICK = 1.0


def options(text: str) -> dict[str, Any]:
  """Reads 'timeout_min=60,slurm_partition=gpu'; whole numbers are numbers.

  Raises:
    UserError: a part is not NAME=VALUE.
  """
  found = {}
  for part in filter(None, text.split(',')):
    name, equals, value = part.partition('=')
    if not equals or not name.isidentifier():
      raise errors.UserError(
          f'--cluster_options={text}: {part!r} is not NAME=VALUE, such as '
          'timeout_min=60,slurm_partition=gpu,gpus_per_node=1.'
      )
    found[name] = int(value) if value.isdigit() else value
  return found


def run(
    jobs: Sequence[sweep_jobs.Job],
    parallel: int,
    stop: sweep_jobs.StopSignal,
    on_wait: Callable[[list[str]], None],
    executor: str,
    parameters: Mapping[str, Any],
    folder: pathlib.Path,
) -> Iterator[tuple[str, int]]:
  """Submits commands, waits; yields (name, exit code) as they end.

  Args:
    jobs, stop, on_wait: as of `sweep_jobs.run`; what is asked to stop is
      cancelled.
    parallel: of Slurm's array, how many at a time; 0 for all.
    executor: one of EXECUTORS.
    parameters: of submitit's `update_parameters`.
    folder: for submitit's own files.

  Raises:
    UserError: submitit is not installed, or refuses executor or parameters.
  """
  submitted = _submit(jobs, parallel, executor, parameters, folder)
  told = 0
  while submitted:
    if stop.asked > told:
      told = stop.asked
      for one in submitted.values():
        one.cancel(check=False)
    on_wait(list(submitted))
    # The debug executor works while it is asked for a result, not before.
    ended = [n for n, j in submitted.items() if executor == 'debug' or j.done()]
    for name in ended:
      yield name, _code(submitted.pop(name))
    if not ended:
      time.sleep(_TICK)


def _submit(jobs, parallel, executor, parameters, folder):
  try:
    import submitit  # pylint: disable=import-outside-toplevel
  except ImportError as error:
    raise errors.UserError(
        f"--executor={executor} takes submitit: pip install '.[cluster]', or "
        'leave the flag out.'
    ) from error
  parameters = {'timeout_min': _MINUTES, **parameters}
  if executor == 'slurm' and parallel:
    parameters['slurm_array_parallelism'] = parallel
  try:
    made = submitit.AutoExecutor(folder=folder, cluster=executor)
    made.update_parameters(**parameters)
    found = made.map_array(_work, jobs)
  # It says what it does not take by NameError, AssertionError and others.
  except Exception as error:
    raise errors.UserError(
        f'--executor={executor}: submitit says: {error}'
    ) from error
  print('Submitted: ' + ', '.join(
      f'{job.name} as {one.job_id}' for job, one in zip(jobs, found)
  ), flush=True)
  return {job.name: one for job, one in zip(jobs, found)}


def _work(job):
  """Runs one command where the cluster put it; returns its exit code."""
  process = sweep_jobs.start(job)
  while True:
    try:
      return process.wait()
    except KeyboardInterrupt:
      process.terminate()


def _code(submitted):
  """A job's exit code; 1 where the cluster ended it before it had one."""
  if submitted.exception() is not None:
    return 1
  return submitted.result()
