"""Which of several processes is this, and what do they agree on?

Every process runs the same program on its own devices; together they are one
mesh. Arrays lie where `sharding` says, text is read in shares, the first
process alone writes reports.
"""

import sys
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from gemma_qat import errors


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
  """Joins the processes of a job; before anything asks JAX for devices.

  Args:
    coordinator: 'HOST:PORT' of the first process.
    num_processes: how many there are.
    process_id: which of them this is, from 0.

  Without arguments Slurm, Open MPI, Kubernetes and TPU pods are found by JAX.

  Raises:
    UserError: they are not found, or do not meet within five minutes.
  """
  given = (coordinator, num_processes, process_id)
  if any(x is not None for x in given) and any(x is None for x in given):
    raise errors.UserError(
        '--coordinator=HOST:PORT, --num_processes=N and --process_id=I belong '
        'together: give all three, or --distributed alone on a cluster that '
        'JAX knows.'
    )
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id)
  except (ValueError, RuntimeError) as error:
    reason = str(error).strip().splitlines()[0]
    raise errors.UserError(
        f'The processes of this job did not find each other ({reason}): check '
        '--coordinator, --num_processes and --process_id, the same on every '
        'host but for the last.'
    ) from error


def leave() -> None:
  """Parts from the others: what follows is done by this process alone."""
  if jax.process_count() > 1:
    jax.distributed.shutdown()


def is_first() -> bool:
  """Whether this process writes what is written once."""
  return jax.process_index() == 0


def say(text: str) -> None:
  """Prints a line for the user, once."""
  if is_first():
    print(text, file=sys.stderr, flush=True)


def wait(name: str) -> None:
  """Waits until every process has come to this line."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def anyone(flag: bool) -> bool:
  """Whether it is so for any process; all have to ask at once."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def put(tree: Any, shardings: Any) -> Any:
  """Lays out a tree of arrays that every process holds the whole of."""
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)

  def place(x, where):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda i: x[i])

  return jax.tree.map(place, tree, shardings)


def fetch(tree: Any) -> Any:
  """Brings a tree of arrays to every process, whole."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def put_share(batch: Any, where: jax.sharding.Sharding) -> Any:
  """Lays out a batch of which every process holds its share of the rows."""
  if jax.process_count() == 1:
    return jax.device_put(batch, where)
  return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(where, x), batch
  )
