"""What made this workdir: which config, which program, on what devices?"""

from collections.abc import Mapping, Sequence
import json
import pathlib
import platform
import typing
from typing import Any

import jax
import ml_collections

from gemma_qat import distances
from gemma_qat import errors
from gemma_qat.checkpoints import regular_files
from gemma_qat.training import settings
from gemma_qat.training import workdir as workdirs

_SECTIONS = {
    'quant': settings.QuantSettings,
    'loss': distances.Options,
    'train': settings.TrainSettings,
    'optimizer': settings.OptimizerSettings,
    'compute': settings.ComputeSettings,
    'mesh': settings.MeshSettings,
}
# What no dataclass of `settings` freezes.
_OTHERS = {
    'name': str,
    'seed': int,
    'model.checkpoint': str,
    'model.scan_layers': bool,
    'data.train': str,
    'data.heldout_fraction': float,
    'evaluation.text': str,
    'evaluation.context': int,
    'evaluation.chunks': int,
    'evaluation.jax_chunks': int,
    'evaluation.prompts': tuple,
    'evaluation.sample_tokens': int,
}
# How what revision.json says is found out now; the other names are packages.
_NOW = {
    'git': workdirs.git_revision,
    'python': platform.python_version,
    'device': workdirs.device_name,
    'devices': jax.device_count,
}


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """Makes of `config.json` the config that began the run, locked.

  Raises:
    UserError: no run began there, the file is damaged, or its fields are not
      those of this program.
  """
  path = workdir / workdirs.CONFIG
  if not path.is_file():
    raise errors.UserError(
        f'{workdir} holds no run (no {workdirs.CONFIG}): give the --workdir of '
        'gemma-qat run or train.'
    )
  config = _json(path)
  _check_fields(path, config)
  return ml_collections.ConfigDict(config).lock()


def read_revision(workdir: pathlib.Path) -> dict[str, Any]:
  """What `revision.json` says, {} where there is none.

  Raises:
    UserError: it is damaged.
  """
  path = workdir / workdirs.REVISION
  return _json(path) if path.exists() else {}


def changes(revision: Mapping[str, Any]) -> list[str]:
  """Says what is not now as it was when a run began, a line each."""
  now = {name: _now(name) for name in revision}
  return [
      f'{name} was {was}, now {now[name]}' for name, was in revision.items()
      if was != now[name]
  ]


def check_devices(
    config: ml_collections.ConfigDict, revision: Mapping[str, Any]
) -> None:
  """Refuses another number of devices than a run had.

  Sums over devices depend on how many there are, so that no bit would agree.

  Raises:
    UserError: there are more or fewer.
  """
  mesh = config.mesh
  # Before revisions counted devices, a whole mesh is the only sign.
  needed = revision.get('devices') or (
      None if mesh.data == -1 else mesh.data * mesh.fsdp * mesh.tensor
  )
  found = jax.device_count()
  if needed is not None and needed != found:
    raise errors.UserError(
        f'The run had {needed} devices, here are {found}: its numbers come out '
        f'the same only on {needed} (for as many simulated ones on a CPU: '
        f'XLA_FLAGS=--xla_force_host_platform_device_count={needed}).'
    )


def field_types() -> dict[str, type]:
  """Every field of a config, by 'section.field', and the type it has."""
  found = dict(_OTHERS)
  for section, kind in _SECTIONS.items():
    for name, hint in typing.get_type_hints(kind).items():
      found[f'{section}.{name}'] = _plain_type(hint)
  return found


def _plain_type(hint):
  """tuple, dict or the type itself."""
  kind = typing.get_origin(hint) or hint
  if issubclass(kind, Mapping):
    return dict
  is_sequence = issubclass(kind, Sequence) and not issubclass(kind, str)
  return tuple if is_sequence else kind


def _json(path):
  try:
    # JSON has no tuples, and a config no lists.
    found = _tuples(json.loads(
        regular_files.read_text(path, regular_files.LARGEST_SMALL)
    ))
    if not isinstance(found, dict):
      raise ValueError('it holds no JSON object')
  except (ValueError, RecursionError) as error:
    raise errors.UserError(
        f'{path} is damaged ({error}): what made this run is not known, begin '
        'it anew in another workdir.'
    ) from error
  return found


def _check_fields(path, config):
  """Raises a UserError unless all fields are there, of the right types."""
  found = {}
  for name, value in config.items():
    if isinstance(value, dict):
      found |= {f'{name}.{field}': v for field, v in value.items()}
    else:
      found[name] = value
  types = field_types()
  for text, names in (
      ('does not have', types.keys() - found.keys()),
      ('has an unknown', found.keys() - types.keys()),
  ):
    if names:
      raise errors.UserError(
          f'{path} {text} config.{min(names)}: a program of another version '
          f'wrote it, see {workdirs.REVISION}: reproduce the run with that.'
      )
  for name, value in found.items():
    wanted = (int, float) if types[name] is float else types[name]
    # True is an int, too.
    if not isinstance(value, wanted) or (
        isinstance(value, bool) and types[name] is not bool
    ):
      raise errors.UserError(
          f'{path} is damaged: config.{name} is {value!r}, which is no '
          f'{types[name].__name__}.'
      )


def _tuples(value):
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _now(name):
  return _NOW[name]() if name in _NOW else workdirs.version(name)
