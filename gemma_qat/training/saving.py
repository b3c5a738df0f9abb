"""How does a run survive being stopped?

A step's folder holds what `checkpoints.orbax_files` reads (student, manifest,
tokenizer) and what only training needs: the optimizer's state, and in the
manifest the state of the data iterator.
"""

import os
import pathlib
import shutil
from typing import Any, Mapping

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from gemma_qat import errors
from gemma_qat import hosts
from gemma_qat.checkpoints import orbax_files
from gemma_qat.checkpoints import sums
from gemma_qat.training import step as step_lib
from gemma_qat.training import student as student_lib

FOLDER, DAMAGED = 'checkpoints', 'damaged'
_KL = 'heldout_kl_nats'


def latest(workdir: pathlib.Path) -> int | None:
  """The newest step of a workdir that Orbax finished; its arrays are not read.
  """
  return next(iter(orbax_files.steps(workdir / FOLDER)), None)


def newest_whole(workdir: pathlib.Path) -> int | None:
  """The newest step whose every array is what was saved.

  Damaged ones on the way there move to 'damaged/', so that training can write
  these steps anew; it is said which and why. Of several processes all call it
  and the first looks.

  Raises:
    UserError: a step is of another version of the program.
  """
  if hosts.is_first():
    _set_aside_rests(workdir)
    for step in orbax_files.steps(workdir / FOLDER):
      try:
        orbax_files.verify(workdir / FOLDER / str(step))
        break
      except orbax_files.OtherVersion:
        raise
      except errors.UserError as error:
        moved = _set_aside(workdir, str(step))
        hosts.say(f'{error} It was moved to {moved}.')
  hosts.wait('newest_whole')
  return latest(workdir)


class Saver:
  """Writes and restores the steps of one workdir.

  Use as a context manager: leaving it waits for a save under way.
  """

  def __init__(
      self,
      workdir: pathlib.Path,
      keep: int,
      keep_best: int = 0,
      keep_every: int = 0,
  ):
    """Opens a workdir; see `settings.TrainSettings` for what is kept."""
    policies = ocp.training.save_decision_policies
    kept = ocp.training.preservation_policies
    keeping = [kept.LatestN(keep)]
    if keep_best:
      keeping.append(kept.BestN(
          n=keep_best, reverse=True, get_metric_fn=lambda found: found[_KL],
          keep_checkpoints_without_metrics=False,
      ))
    if keep_every:
      keeping.append(kept.EveryNSteps(keep_every))
    self._sums = {}
    self._context = orbax_files.context()
    self._checkpointer = ocp.training.Checkpointer(
        (workdir / FOLDER).resolve(),
        context=self._context,
        # The loop decides when; Orbax only must not say no.
        save_decision_policy=policies.FixedIntervalPolicy(1),
        preservation_policy=kept.AnyPreservationPolicy(keeping),
        cleanup_tmp_directories=True,
    )
    self._under_way = None

  def __enter__(self):
    return self

  def __exit__(self, kind, *exception):
    # What one of several processes failed at the others do not know of: Orbax
    # would wait for them.
    if jax.process_count() == 1 or kind in (None, errors.Stopped):
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
      heldout_kl: float | None = None,
  ) -> None:
    """Starts to write a step; the arrays may be donated once it returns.

    Args:
      state: what was trained.
      frozen: the untrained leaves by path.
      manifest: JSON; sums of all arrays are added.
      tokenizer: from `orbax_files.tokenizer_tree`.
      heldout_kl: for `keep_best`, which passes over steps without.

    Raises:
      UserError: the step, or the one before it, cannot be written.
    """
    step = int(state.step)
    trees = {
        'student': student_lib.join(state.trained, frozen),
        'optimizer': _numbered(state.optimizer),
        'tokenizer': dict(tokenizer),
    }
    found = self._sums_of(traverse_util.flatten_dict(trees, sep='/'))
    by_tree = {name: {} for name in trees}
    for path, said in found.items():
      name, _, rest = path.partition('/')
      by_tree[name][rest] = said
    try:
      # A save whose result nobody takes keeps a thread and three open files:
      # after 340 saves a process may open no more.
      if self._under_way is not None:
        self._under_way.result()
      self._under_way = self._checkpointer.save_checkpointables_async(
          step,
          {**trees, 'manifest': orbax_files.sealed(manifest, by_tree)},
          metrics=None if heldout_kl is None else {_KL: heldout_kl},
      )
    except OSError as error:
      raise errors.UserError(
          f'The checkpoint of step {step} cannot be written to '
          f'{self._checkpointer.directory} ({error}): make room or choose '
          'another --workdir. Earlier checkpoints are whole.'
      ) from error

  def _sums_of(self, leaves):
    """`sums.of_all`, remembered of host arrays: they are frozen."""
    known = {
        path: self._sums[path][1] for path, x in leaves.items()
        if self._sums.get(path, (None,))[0] is x
    }
    found = known | sums.of_all(
        {path: x for path, x in leaves.items() if path not in known}
    )
    for path, x in leaves.items():
      if not isinstance(x, jax.Array):
        self._sums[path] = x, found[path]
    return found

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


def _set_aside_rests(workdir):
  """Moves away what has the name of a step and is none: its files are gone."""
  folder = workdir / FOLDER
  whole = {str(n) for n in orbax_files.steps(folder)}
  for path in folder.iterdir() if folder.is_dir() else ():
    if path.name.isdecimal() and path.name not in whole:
      moved = _set_aside(workdir, path.name)
      hosts.say(f'{path} is no whole checkpoint. It was moved to {moved}.')


def _set_aside(workdir, name):
  try:
    target = workdir / DAMAGED / name
    target.parent.mkdir(exist_ok=True)
    # One of each step is enough to look at.
    shutil.rmtree(target, ignore_errors=True)
    os.replace(workdir / FOLDER / name, target)
  except OSError as error:
    raise errors.UserError(
        f'{workdir / FOLDER / name} is damaged and cannot be moved away '
        f'({error.strerror}): remove it.'
    ) from error
  return target


def _numbered(tree: Any) -> dict[str, Any]:
  """The leaves by number: a layout that outlives optax's own tuples."""
  return {f'{i:04d}': x for i, x in enumerate(jax.tree.leaves(tree))}
