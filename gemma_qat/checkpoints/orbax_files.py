"""How does a student come out of a checkpoint that training left?

A step is a folder 'WORKDIR/checkpoints/STEP', written by Orbax v1 with these
checkpointables (the loop adds its own, which are not read here):
  student: the tree of `model.weights`, a node of `quant.lattice` or an array
    at each path;
  manifest: JSON, see `manifest` and `sealed`;
  tokenizer: {'bytes': uint8 array}, `Tokenizer.to_bytes`; may be missing.
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import names
from gemma_qat.checkpoints import orbax_arrays
from gemma_qat.checkpoints import regular_files
from gemma_qat.checkpoints import sums
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.model import config as model_config
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import formats
from gemma_qat.quant import lattice
from gemma_qat.quant import low_rank

# Counts up when the content of a step changes.
_VERSION = 1
# Orbax writes this file last and renames the folder after it.
_DONE = '_CHECKPOINT_METADATA'
# In the folder of the manifest, as `ocp.handlers.JsonHandler` names it.
_MANIFEST = 'data.json'
# More than any model has; groups of them are one array.
_MOST_LAYERS = 1_000
_LARGEST_TOKENIZER = 2**26
_NODE_PARTS = {'codes', *low_rank.PARTS}
# What has to be decoded to read any part of an array.
_CHUNK_BYTES = 2**26


class OtherVersion(errors.UserError):
  """A step that is whole, but was written by another version of the program."""


def context() -> ocp.Context:
  """Returns the Orbax context to save with.

  The manifest becomes plain JSON: otherwise Orbax would store every number of
  it as an array. Arrays are cut into chunks, those of the groups layer by
  layer: otherwise each would be one chunk, 4.6 GB of it at 27B, and reading a
  layer would decode all of them.
  """
  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name='manifest')
  result = ocp.Context()
  result.checkpointables.registry = registry
  saving = result.array.saving
  saving.storage_options.chunk_byte_size = _CHUNK_BYTES
  by_layer = dataclasses.replace(saving.storage_options, shard_axes=(0,))
  saving.scoped_storage_options_creator = lambda path, value: (
      by_layer if np.ndim(value) > 2 and _is_group(path) else None
  )
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


def sealed(
    manifest: Mapping[str, Any],
    found: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
  """Adds to a manifest what `verify` asks for.

  Args:
    manifest: what is written beside the trees, JSON.
    found: name of a tree -> {path in it: `sums.of` the array}.
  """
  whole = {k: v for k, v in manifest.items() if k != 'digest'}
  whole['sums'] = {name: dict(s) for name, s in found.items()}
  return {**whole, 'digest': _digest(whole)}


def verify(step: pathlib.Path) -> None:
  """Compares every array of a step with what was saved, one at a time.

  Steps of former versions, which say no sums, are only read.

  Raises:
    OtherVersion: the step is one of another program.
    UserError: the step is damaged; names what.
  """
  step = step.resolve()
  said = load_manifest(step)
  if 'version' not in said:
    raise errors.UserError(
        f'{step} is damaged, its manifest is not ours: take another step.'
    )
  _check_version(step, said)
  if 'digest' in said and _digest(said) != said['digest']:
    raise errors.UserError(
        f'{step} is damaged, its manifest is not the one that was saved: take '
        'another step.'
    )
  for name, wanted in _said_sums(step, said).items():
    arrays = orbax_arrays.open_tree(step / name)
    if wanted is not None and arrays.keys() != wanted.keys():
      odd = min(arrays.keys() ^ wanted.keys())
      raise errors.UserError(
          f'{step} is damaged, its {name} has not the arrays that were saved '
          f'({odd}): take another step.'
      )
    for path, array in arrays.items():
      found = array.read(())
      if wanted is not None and _sum(found) != wanted[path]:
        raise errors.UserError(
            f'{step} is damaged, {path} in its {name} is not what was saved: '
            'take another step.'
        )


def steps(path: str | os.PathLike) -> list[int]:
  """Numbers of the whole steps in a 'checkpoints' folder, the newest first."""
  folder = pathlib.Path(path)
  if not folder.is_dir():
    return []
  found = [int(p.name) for p in folder.iterdir()
           if p.name.isdecimal() and _is_step(p)]
  return sorted(found, reverse=True)


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
  """Opens the student of a step; its weights are read when asked for.

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
  if (step / 'tokenizer').exists():
    tokenizer = _read_tokenizer(step)
  student = orbax_arrays.open_tree(step / 'student')
  orbax_arrays.check_density(step / 'student', student)
  return checkpoints.Checkpoint(
      config=config,
      weights=_weights(step, config, plan, student),
      tokenizer=tokenizer,
      metadata={k: said[k] for k in ('step', 'run', 'quant')},
      source=str(step),
      layout='orbax',
  )


def load_manifest(step: pathlib.Path) -> dict[str, Any]:
  """Reads what `manifest` said, and what the loop added to it.

  Raises:
    UserError: it is missing or damaged.
  """
  # Not through Orbax, whose readers raise whatever a damaged file makes them.
  return regular_files.read_json(step / 'manifest' / _MANIFEST)


def load_tree(step: pathlib.Path, name: str) -> dict[str, Any]:
  """Reads one tree of a step, as numpy arrays whatever the mesh was.

  By the reader that `verify` and `load` use: what one of them takes the others
  do not refuse.

  Raises:
    UserError: it is not there or damaged.
  """
  arrays = orbax_arrays.open_tree(step / name)
  return traverse_util.unflatten_dict(
      {path: array.read(()) for path, array in arrays.items()}, sep='/'
  )


def _newest(path):
  if _is_step(path):
    return path
  found = [
      folder / str(n) for folder in (path, path / 'checkpoints')
      for n in steps(folder)[:1]
  ]
  return max(found, key=lambda p: int(p.name), default=None)


def _digest(said):
  rest = {k: v for k, v in said.items() if k != 'digest'}
  try:
    text = json.dumps(rest, sort_keys=True)
  except RecursionError:
    return None  # What was read is too deep to be written: no manifest of ours.
  return hashlib.sha256(text.encode()).hexdigest()


def _said_sums(step, said):
  found = said.get('sums') or {'student': None, 'optimizer': None}
  if not isinstance(found, dict) or 'sums' in said and not all(
      pathlib.PurePath(name).name == name and isinstance(s, dict)
      for name, s in found.items()
  ):
    raise errors.UserError(
        f'{step} is damaged, its manifest has no sums that can be read: take '
        'another step.'
    )
  return found


def _sum(array):
  # Other sizes and types, which a damaged file may claim, have no sums.
  is_summed = array.dtype.itemsize <= 4 and array.dtype != bool
  return sums.of(array) if is_summed else None


def _is_step(path):
  return (path / _DONE).is_file() and all(
      (path / part).is_dir() for part in ('student', 'manifest')
  )


def _read_tokenizer(step):
  stored = orbax_arrays.open_tree(step / 'tokenizer').get('bytes')
  if (
      stored is None or stored.dtype != np.uint8 or len(stored.shape) != 1
      or stored.shape[0] > _LARGEST_TOKENIZER
  ):
    raise errors.UserError(
        f'{step} is damaged, its tokenizer is not bytes: take another step.'
    )
  with errors.about(step):
    return tokenizers.from_bytes(stored.read(()).tobytes())


def _read_manifest(step, said):
  """Returns the sizes and {tree path: lattice.Entry}."""
  try:
    _check_version(step, said)
    with errors.about(step):
      config = model_config.ModelConfig(**said['model'])
      if config.num_layers > _MOST_LAYERS:
        raise ValueError(f'{config.num_layers} layers')
      specs = model_weights.tree_specs(config)
      plan = {
          path: _entry(name, mode, specs[path])
          for path, (name, mode) in said['quant'].items()
      }
    said['step'], said['run']
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise errors.UserError(
        f'{step} has a manifest that is not ours ({error!r}): take another '
        'checkpoint.'
    ) from error
  return config, plan


def _check_version(step, said):
  if said['version'] != _VERSION:
    raise OtherVersion(
        f'{step} has manifest version {said["version"]}, this program reads '
        f'{_VERSION}: use the program that wrote it.'
    )


def _entry(name, mode, spec):
  """Returns a line of the plan, which only matrices have."""
  lattice.check_mode(mode)
  if not spec.contraction:
    raise ValueError(mode)
  return lattice.Entry(formats.get(name), mode, spec.contraction)


def _weights(step, config, plan, student):
  """Cuts the tree into layers; nodes are quantized when they are read."""
  nodes = _nodes(step, student)
  names.check_shapes(
      str(step),
      {p: s.shape for p, s in model_weights.tree_specs(config).items()},
      {p: _main(node).shape for p, node in nodes.items()},
  )
  for path, node in nodes.items():
    _check_node(step, path, node, plan.get(path))
  entries = {}
  for name, spec in model_weights.by_layer_specs(config).items():
    path, group = _tree_path(config, name)
    node, entry = nodes[path], plan.get(path)
    layers = 1 if group is None else config.num_groups
    entries[name] = checkpoints.Entry(
        entry.format.stored_as if entry else str(_main(node).dtype),
        entry.format.stored_as if entry else None,
        spec.shape,
        sum(math.prod(a.shape) * a.itemsize for a in _parts(node)) // layers,
        functools.partial(_read, node, entry, group),
    )
  return checkpoints.Weights(entries)


def _nodes(step, student):
  """Returns {tree path: a lazy array or a dict of them}."""
  plain, nodes = {}, {}
  for path, array in student.items():
    weight, _, part = path.rpartition('/')
    is_codes = part == 'codes'
    if is_codes != (array.dtype == np.int8) or not (
        is_codes or jnp.issubdtype(array.dtype, jnp.floating)
    ):
      raise errors.UserError(
          f'{step} is damaged, {path} in its student has type {array.dtype}: '
          'take another step.'
      )
    if part in _NODE_PARTS:
      nodes.setdefault(weight, {})[part] = array
    else:
      plain[path] = array
  if twice := plain.keys() & nodes.keys():
    raise errors.UserError(
        f'{step} is damaged, its student has {min(twice)} as an array and as '
        'several: take another step.'
    )
  return plain | nodes


def _check_node(step, path, node, entry):
  """Raises a UserError unless a node is one that its mode could have made."""
  wanted = _part_shapes(
      _main(node).shape, entry, path.startswith('groups/')
  )
  found = jax.tree.map(lambda a: tuple(a.shape), node, is_leaf=_is_array)
  if found != wanted:
    raise errors.UserError(
        f'{step} is damaged, its student has {found} at {path} where {wanted} '
        'belongs: take another step.'
    )


@functools.cache
def _part_shapes(shape, entry, stacked):
  if entry is None or entry.mode in ('derived', 'fixed'):
    return shape
  node = jax.eval_shape(
      lambda w: lattice.init_node(w, *entry, stacked=stacked),
      jax.ShapeDtypeStruct(shape, jnp.float32),
  )
  return {part: tuple(value.shape) for part, value in node.items()}


def _read(node, entry, group, rows):
  layer = () if group is None else (group,)
  if isinstance(node, dict):
    # One factor has no rows: its product with the other has.
    node = {
        part: a.read(layer if part == 'lora_a' else (*layer, rows))
        for part, a in node.items()
    }
  else:
    node = node.read((*layer, rows))
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
    return node.get('codes') or node.get('master') or node['scale']
  return node


def _parts(node):
  return list(node.values()) if isinstance(node, dict) else [node]


def _is_array(node):
  return isinstance(node, orbax_arrays.LazyArray)


def _is_group(path):
  return getattr(path[0], 'key', None) == 'groups'


def _tree_path(config, name):
  """Returns the tree path of a by-layer name, and its index in the stack."""
  layer, slash, rest = name.partition('/')
  if not slash:
    return name, None
  number = int(layer.removeprefix('layer_'))
  group, i = divmod(number, config.pattern)
  if group < config.num_groups:
    return f'groups/layer_{i}/{rest}', group
  first = config.num_groups * config.pattern
  return f'tail/layer_{number - first}/{rest}', None
