"""Which codes does a student stand at, and when do they come to rest?"""

import dataclasses
from typing import Any, Mapping

from flax import traverse_util
import jax
import jax.numpy as jnp

from gemma_qat import errors
from gemma_qat.quant import lattice
from gemma_qat.quant import rules
from gemma_qat.training import optimizer as optimizer_lib
from gemma_qat.training import settings
from gemma_qat.training import step as step_lib

# One program for each shape.
_quantized = jax.jit(lattice.quantized, static_argnums=(1, 2, 3))


def moving(plan: Mapping[str, lattice.Entry], groups) -> list[str]:
  """Paths of the weights whose codes training can change.

  Args:
    plan: from `student.make_plan`.
    groups: trained leaves -> group.
  """
  return [
      path for path, entry in plan.items()
      if _moves(entry[1]) and any(
          leaf in groups for leaf in _leaves(path, entry[1])
      )
  ]


def make_read(plan: Mapping[str, lattice.Entry], paths: list[str]):
  """Builds read(trained, frozen) -> {path: int8 codes}.

  Args:
    plan: from `student.make_plan`.
    paths: from `moving`.
  """
  def read(trained, frozen):
    leaves = {**frozen, **trained}
    return {path: quantized(leaves, path, plan[path]).codes for path in paths}

  return read


@jax.jit
def share_that_differs(codes, others):
  """Of two readings of `make_read`."""
  pairs = [(codes[path], others[path]) for path in codes]
  changed = sum(jnp.sum(x != y, dtype=jnp.float32) for x, y in pairs)
  return changed / sum(x.size for x, _ in pairs)


def quantized(leaves: Mapping[str, Any], path: str, entry):
  """Codes and scales at a path of {leaf path: leaf}; see `lattice.quantized`.
  """
  return lattice.quantized(_node(leaves, path, entry), *entry)


def frozen_plan(plan: Mapping[str, lattice.Entry]):
  """The plan after `freeze`."""
  return {
      path: lattice.Entry(f, 'codes' if _moves(mode) else mode, contraction)
      for path, (f, mode, contraction) in plan.items()
  }


def freeze(student: Mapping[str, Any], plan: Mapping[str, lattice.Entry]):
  """Lets all codes stand where they are.

  Args:
    student: tree.
    plan: from `student.make_plan`.

  Returns:
    The tree of `frozen_plan`. What the forward pass sees is the same to the
    bit.
  """
  flat = traverse_util.flatten_dict(dict(student), sep='/')
  for path, entry in plan.items():
    if not _moves(entry[1]):
      continue
    found = _quantized(_node(flat, path, entry), *entry)
    # A learned scale goes on as it was trained, not as float16 stores it.
    scale = flat.get(path + '/scale', found.scale)
    for leaf in _leaves(path, entry[1]):
      flat.pop(leaf)
    flat[path + '/codes'], flat[path + '/scale'] = found.codes, scale
  return traverse_util.unflatten_dict(flat, sep='/')


def settings_when_frozen(s: settings.Settings, student) -> settings.Settings:
  """Drops training rules that are of masters alone.

  Args:
    s: of the run.
    student: a tree of `freeze`, or `student.outline` of `frozen_plan`.

  Raises:
    UserError: no rule is left that trains anything.
  """
  leaves = list(traverse_util.flatten_dict(student, sep='/'))
  left = rules.fitting(s.train.rules, leaves)
  if not rules.resolve(left, leaves):
    raise errors.UserError(
        f'config.train.freeze_codes={s.train.freeze_codes} leaves nothing to '
        'train in the last steps: add a rule for scales or norms to '
        'config.train.rules, or set it to 0.'
    )
  return s._replace(train=dataclasses.replace(s.train, rules=left))


def carry(fresh: step_lib.State, before: step_lib.State) -> step_lib.State:
  """Takes what an optimizer knew of the leaves that are trained on.

  A running mean begins anew: it would still remember what is no longer.
  """
  is_mean = lambda x: isinstance(x, optimizer_lib.Average)
  known = dict(
      jax.tree_util.tree_leaves_with_path(before.optimizer, is_leaf=is_mean)
  )

  def take(path, x):
    old = known.get(path)
    if old is None or is_mean(x):
      return x
    return old if (old.shape, old.dtype) == (x.shape, x.dtype) else x

  return fresh._replace(
      step=before.step,
      skipped=before.skipped,
      optimizer=jax.tree_util.tree_map_with_path(
          take, fresh.optimizer, is_leaf=is_mean
      ),
  )


def _moves(mode):
  """Whether codes follow from a master."""
  return mode == 'derived' or lattice.is_learned(mode)


def _node(leaves, path, entry):
  parts = lattice.parts(entry[1])
  if not parts:
    return leaves[path]
  return {part: leaves[f'{path}/{part}'] for part in parts}


def _leaves(path, mode):
  return [f'{path}/{part}' for part in lattice.parts(mode)] or [path]
