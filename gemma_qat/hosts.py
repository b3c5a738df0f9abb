"""Which of several processes is this, and what do they agree on?

Every process runs the same program on its own devices; together they are one
mesh. Arrays lie where `sharding` says, text is read in shares, the first
process alone writes reports.
"""

from collections.abc import Iterator
import contextlib
import os
import sys
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np

from gemma_qat import errors

# After so long a silence a process counts as gone (JAX's own: 100), and so long
# one that ends waits for the others (300).
_SILENCE_SECONDS, _PARTING_SECONDS = 60, 60
# What the libraries say when a process at the other end is gone: Gloo and NCCL,
# which carry the arrays, and JAX's coordination service.
_GONE = (
    'gloo', 'nccl', 'connection', 'peer', 'heartbeat', 'coordination',
    'unavailable', 'barrier', 'socket',
)


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
    jax.distributed.initialize(
        coordinator, num_processes, process_id,
        heartbeat_timeout_seconds=_SILENCE_SECONDS,
        shutdown_timeout_seconds=_PARTING_SECONDS,
    )
  except (ValueError, RuntimeError) as error:
    reason = str(error).strip().splitlines()[0]
    raise errors.UserError(
        f'The processes of this job did not find each other ({reason}): check '
        '--coordinator, --num_processes and --process_id, the same on every '
        'host but for the last.'
    ) from error


def leave() -> None:
  """Parts from the others: what follows is done by this process alone."""
  if is_joined():
    jax.distributed.shutdown()


def is_joined() -> bool:
  """Whether other processes wait for this one."""
  return jax.distributed.is_initialized()


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Says in one line that another process is gone, where the block meets that.

  Raises:
    UserError: another process of the job ended.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).strip().splitlines()[0]
    if jax.process_count() == 1 or not any(
        word in reason.lower() for word in _GONE
    ):
      raise
    raise errors.UserError(
        f'Another process of this job is gone ({reason:.200}): see what it '
        'said last, then start all of them with the same command. They go on '
        'from the last checkpoint.'
    ) from error


def abandon(code: int) -> NoReturn:
  """Ends this process without the farewell for which others would be awaited.

  They learn of it by the connections that close, and end as well.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)  # pylint: disable=protected-access


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
