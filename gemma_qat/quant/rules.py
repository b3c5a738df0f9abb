"""Which weight gets which value? Ordered rules of (regex, value) say it."""

import re
from typing import Iterable, Sequence, TypeVar

import jax
import numpy as np

from gemma_qat import errors

T = TypeVar('T')


def resolve(
    rules: Sequence[tuple[str, T]], paths: Iterable[str]
) -> dict[str, T]:
  """Gives each path the value of the first rule whose regex is found in it.

  Args:
    rules: (regex, value), in order; a value of None means: explicitly nothing.
    paths: names of weights.

  Returns:
    path -> value, in the order of `paths`. Paths of no rule, or of one whose
    value is None, are absent.

  Raises:
    UserError: a regex is broken or found in no path at all.
  """
  paths = list(paths)
  patterns = [_compile(regex) for regex, _ in rules]
  for pattern in patterns:
    if not any(pattern.search(path) for path in paths):
      raise errors.UserError(
          f'The rule {pattern.pattern!r} fits no weight: correct or remove it. '
          f'Weights are named like {", ".join(_spread(paths))}.'
      )
  resolved = {}
  for path in paths:
    for pattern, (_, value) in zip(patterns, rules):
      if pattern.search(path):
        if value is not None:
          resolved[path] = value
        break
  return resolved


def fitting(
    rules: Sequence[tuple[str, T]], paths: Iterable[str]
) -> tuple[tuple[str, T], ...]:
  """Leaves out the rules whose regex is found in no path."""
  paths = list(paths)
  return tuple(
      (regex, value) for regex, value in rules
      if any(_compile(regex).search(path) for path in paths)
  )


def check_finite(name: str, array: jax.Array | np.ndarray) -> None:
  """Raises a UserError that names the tensor if it holds NaN or infinity."""
  count = int((~np.isfinite(np.asarray(array, np.float32))).sum())
  if count:
    raise errors.UserError(
        f'{name} holds {count} values that are NaN or infinite, of '
        f'{array.size}: check the checkpoint that it came from.'
    )


def _compile(regex):
  try:
    return re.compile(regex)
  except re.error as e:
    raise errors.UserError(
        f'The rule {regex!r} is no regular expression: {e}.'
    ) from e


def _spread(paths, count=4):
  """A few paths from all over the list: neighbours look alike."""
  return paths[:: max(1, -(-len(paths) // count))]
