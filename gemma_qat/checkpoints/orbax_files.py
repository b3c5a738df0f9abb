"""How does a student come out of a checkpoint that training left?

A step is a folder 'WORKDIR/checkpoints/STEP', written by Orbax v1 with these
checkpointables (the loop adds its own, which are not read here):
  student: the tree of `model.weights`, a node of `quant.lattice` or an array
    at each path;
  manifest: JSON, see `manifest`;
  tokenizer: {'bytes': uint8 array}, `Tokenizer.to_bytes`; may be missing.
"""

from collections.abc import Mapping
import dataclasses
import functools
import os
import pathlib
from typing import Any

from flax import traverse_util
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import names
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.model import config as model_config
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import formats
from gemma_qat.quant import lattice

# Counts up when the content of a step changes.
_VERSION = 1
# Orbax writes this file last and renames the folder after it.
_DONE = '_CHECKPOINT_METADATA'
_NODE_PARTS = {'codes', 'master', 'scale'}


def context() -> ocp.Context:
  """Returns the Orbax context to save with: the manifest becomes plain JSON.

  Without it, Orbax would store every number of the manifest as an array.
  """
  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name='manifest')
  result = ocp.Context()
  result.checkpointables.registry = registry
  return result


def manifest(
    config: model_config.ModelConfig,
    plan: Mapping[str, lattice.Entry],
    step: int,
    run: str,
) -> dict[str, Any]:
  """Says what a step holds: all that `load` needs beside the arrays.

  Args:
    config: the sizes.
    plan: tree path -> format, mode, contraction of the quantized weights.
    step: how many updates the student has seen.
    run: name of the run, for people.
  """
  return {
      'version': _VERSION,
      'model': dataclasses.asdict(config),
      'quant': {
          path: [entry[0].name, entry[1]] for path, entry in plan.items()
      },
      'step': int(step),
      'run': run,
  }


def tokenizer_tree(tokenizer: tokenizers.Tokenizer) -> dict[str, np.ndarray]:
  """Makes the 'tokenizer' checkpointable."""
  return {'bytes': np.frombuffer(tokenizer.to_bytes(), np.uint8).copy()}


def is_ours(path: str | os.PathLike) -> bool:
  """Whether `find_step` would find a step."""
  return _newest(pathlib.Path(path)) is not None


def find_step(path: str | os.PathLike) -> pathlib.Path:
  """Finds the newest whole step.

  Args:
    path: a workdir, its 'checkpoints' folder or one step.

  Raises:
    UserError: there is none.
  """
  step = _newest(pathlib.Path(path))
  if step is None:
    raise errors.UserError(
        f'{path} holds no whole checkpoint of ours: give a workdir, its '
        'checkpoints folder or one step in it.'
    )
  return step


def load(path: str | os.PathLike) -> checkpoints.Checkpoint:
  """Reads the student of a step into memory; nothing else of the step.

  Quantized weights come as `Stored`, made by `lattice.quantized`: the codes
  and scales that the last forward pass saw.

  Raises:
    UserError: no step there, a damaged one, or one of another version.
  """
  # Orbax wants absolute paths.
  step = find_step(path).resolve()
  said = load_manifest(step)
  config, plan = _read_manifest(step, said)
  tokenizer = None
  if (step / 'tokenizer').is_dir():
    stored = _load(step, {'tokenizer': None})['tokenizer']
    tokenizer = tokenizers.from_bytes(np.asarray(stored['bytes']).tobytes())
  student = load_tree(step, 'student')
  return checkpoints.Checkpoint(
      config=config,
      weights=_weights(step, config, plan, student),
      tokenizer=tokenizer,
      metadata={k: said[k] for k in ('step', 'run', 'quant')},
      source=str(step),
      layout='orbax',
  )


def load_manifest(step: pathlib.Path) -> dict[str, Any]:
  """Reads what `manifest` said, and what the loop added to it."""
  return _load(step, {'manifest': None})['manifest']


def load_tree(step: pathlib.Path, name: str) -> dict[str, Any]:
  """Reads one tree of a step, as numpy arrays whatever the mesh was.

  Raises:
    UserError: it is not there or damaged.
  """
  try:
    tree = ocp.metadata(step, checkpointable_name=name).metadata
  except (ValueError, KeyError, OSError, RuntimeError) as error:
    raise errors.UserError(
        f'{step} is damaged, its {name} has no metadata: take another step.'
    ) from error
  # np.empty reserves addresses, not memory.
  like = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), tree)
  return _load(step, {name: like})[name]


def _newest(path):
  if _is_step(path):
    return path
  steps = []
  for folder in (path, path / 'checkpoints'):
    if folder.is_dir():
      steps += [
          p for p in folder.iterdir() if p.name.isdecimal() and _is_step(p)
      ]
  return max(steps, key=lambda p: int(p.name), default=None)


def _is_step(path):
  return (path / _DONE).is_file() and all(
      (path / part).is_dir() for part in ('student', 'manifest')
  )


def _load(step, abstract):
  try:
    return ocp.load_checkpointables(step, abstract)
  except (ValueError, KeyError, OSError, RuntimeError) as error:
    reason = str(error).strip().split('\n')[0][:200]
    raise errors.UserError(
        f'{step} is damaged, {next(iter(abstract))} cannot be read ({reason}): '
        'take another step.'
    ) from error


def _read_manifest(step, said):
  """Returns the sizes and {tree path: lattice.Entry}."""
  try:
    if said['version'] != _VERSION:
      raise errors.UserError(
          f'{step} has manifest version {said["version"]}, this program reads '
          f'{_VERSION}: use the program that wrote it.'
      )
    config = model_config.ModelConfig(**said['model'])
    specs = model_weights.tree_specs(config)
    plan = {
        path: lattice.Entry(formats.get(name), mode, specs[path].contraction)
        for path, (name, mode) in said['quant'].items()
    }
    said['step'], said['run']
  except (KeyError, TypeError, ValueError) as error:
    raise errors.UserError(
        f'{step} has a manifest that is not ours ({error!r}): take another '
        'checkpoint.'
    ) from error
  return config, plan


def _weights(step, config, plan, student):
  """Cuts the tree into layers; nodes are quantized when they are read."""
  nodes = traverse_util.flatten_dict(
      student, sep='/', is_leaf=lambda _, v: _NODE_PARTS.intersection(v)
  )
  names.check_shapes(
      str(step),
      {p: s.shape for p, s in model_weights.tree_specs(config).items()},
      {p: _main(node).shape for p, node in nodes.items()},
  )
  entries = {}
  for name, spec in model_weights.by_layer_specs(config).items():
    path, group = _tree_path(config, name)
    node, entry = nodes[path], plan.get(path)
    if group is not None:
      node = jax.tree.map(lambda a, g=group: a[g], node)
    entries[name] = checkpoints.Entry(
        entry.format.stored_as if entry else str(_main(node).dtype),
        entry.format.stored_as if entry else None,
        spec.shape,
        sum(a.nbytes for a in jax.tree.leaves(node)),
        functools.partial(_read, node, entry),
    )
  return checkpoints.Weights(entries)


def _read(node, entry, rows):
  node = jax.tree.map(lambda a: a[rows], node)
  if entry is None:
    return np.asarray(node, np.float32)
  # A fixed node is compared with its own values, which jit cannot do.
  is_fixed = entry.mode == 'fixed'
  quantize = lattice.quantized if is_fixed else _quantized
  codes, scale = quantize(node, *entry)
  return checkpoints.Stored(
      entry.format.stored_as,
      formats.Quantized(np.asarray(codes), np.asarray(scale)),
  )


# Jitted as in training: the learned 270M takes seconds instead of 28.
_quantized = jax.jit(lattice.quantized, static_argnums=(1, 2, 3))


def _main(node):
  """The part of a node that has the weight's shape."""
  if isinstance(node, dict):
    return node['codes'] if 'codes' in node else node['master']
  return node


def _tree_path(config, name):
  """Returns the tree path of a by-layer name, and its index in the stack."""
  layer, slash, rest = name.partition('/')
  if not slash:
    return name, None
  group, i = divmod(int(layer.removeprefix('layer_')), config.pattern)
  if group < config.num_groups:
    return f'groups/layer_{i}/{rest}', group
  return f'tail/layer_{i}/{rest}', None
