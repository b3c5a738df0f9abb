"""How does a run survive being stopped?

A step's folder holds what `checkpoints.orbax_files` reads (student, manifest,
tokenizer) and what only training needs: the optimizer's state, and in the
manifest the state of the data iterator.
"""

import pathlib
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from gemma_qat import errors
from gemma_qat.checkpoints import orbax_files
from gemma_qat.training import step as step_lib
from gemma_qat.training import student as student_lib

FOLDER = 'checkpoints'


def latest(workdir: pathlib.Path) -> int | None:
  """The newest whole step of a workdir, without opening it for writing."""
  if not orbax_files.is_ours(workdir / FOLDER):
    return None
  return int(orbax_files.find_step(workdir / FOLDER).name)


class Saver:
  """Writes and restores the steps of one workdir.

  Use as a context manager: leaving it waits for a save under way.
  """

  def __init__(self, workdir: pathlib.Path, keep: int):
    policies = ocp.training.save_decision_policies
    self._context = orbax_files.context()
    self._checkpointer = ocp.training.Checkpointer(
        (workdir / FOLDER).resolve(),
        context=self._context,
        # The loop decides when; Orbax only must not say no.
        save_decision_policy=policies.FixedIntervalPolicy(1),
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._checkpointer.close()

  @property
  def latest(self) -> int | None:
    """The newest whole step, None where there is none."""
    newest = self._checkpointer.latest
    return newest.step if newest else None

  def save(
      self,
      state: step_lib.State,
      frozen: Mapping[str, Any],
      manifest: Mapping[str, Any],
      tokenizer: Mapping[str, np.ndarray],
  ) -> None:
    """Starts to write a step; the arrays may be donated once it returns.

    Raises:
      UserError: the step, or the one before it, cannot be written.
    """
    step = int(state.step)
    try:
      self._checkpointer.save_checkpointables_async(
          step,
          {
              'student': student_lib.join(state.trained, frozen),
              'optimizer': _numbered(state.optimizer),
              'manifest': dict(manifest),
              'tokenizer': dict(tokenizer),
          },
      )
    except OSError as error:
      raise errors.UserError(
          f'The checkpoint of step {step} cannot be written to '
          f'{self._checkpointer.directory} ({error}): make room or choose '
          'another --workdir. Earlier checkpoints are whole.'
      ) from error

  def restore(self, step: int) -> tuple[dict, dict, dict]:
    """Reads a step back as host arrays.

    Returns:
      (student tree, numbered optimizer leaves, manifest); see
      `restore_optimizer`.

    Raises:
      UserError: the step cannot be read.
    """
    folder = pathlib.Path(str(self._checkpointer.directory)) / str(step)
    return (
        orbax_files.load_tree(folder, 'student'),
        orbax_files.load_tree(folder, 'optimizer'),
        orbax_files.load_manifest(folder),
    )


def restore_optimizer(like: Any, leaves: Mapping[str, np.ndarray]) -> Any:
  """Puts saved leaves back into the structure of an optimizer state.

  Args:
    like: a fresh state of the same optimizer.
    leaves: from `Saver.restore`.

  Raises:
    UserError: the state is of another optimizer.
  """
  fresh = _numbered(like)
  # Types too: moments in float32 and in bfloat16 have the same shapes.
  kinds = lambda tree: {
      k: (np.shape(x), jnp.dtype(x.dtype)) for k, x in tree.items()
  }
  if kinds(fresh) != kinds(leaves):
    raise errors.UserError(
        'The checkpoint holds the state of another optimizer than the config '
        'asks for: use the config that began the run, or a new --workdir.'
    )
  return jax.tree.unflatten(
      jax.tree.structure(like), [leaves[name] for name in fresh]
  )


def _numbered(tree: Any) -> dict[str, Any]:
  """The leaves by number: a layout that outlives optax's own tuples."""
  return {f'{i:04d}': x for i, x in enumerate(jax.tree.leaves(tree))}
