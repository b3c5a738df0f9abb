"""Which training step do the benchmarks run, without checkpoint or text?

The one of `gemma-qat train` (`training.job`), on random weights of a variant's
sizes and random tokens; settings as in experiments/configs/base.py.
"""

import argparse
import dataclasses
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import numpy as np

from experiments.configs import base as base_config
from gemma_qat import sharding
from gemma_qat.checkpoints import random_weights
from gemma_qat.model import config as model_config
from gemma_qat.model import weights
from gemma_qat.training import job as job_lib
from gemma_qat.training import machine
from gemma_qat.training import settings
from gemma_qat.training import starts
from gemma_qat.training import student as student_lib

MODES = ('derived', 'learned', 'codes')
_FROZEN = (r'^embedding', None)
_NORMS = (r'norm$', 'norms')
_WEIGHTS = (r'(attn_[qkvo]|mlp_(gate|up|down))$', 'weights')
_SCALES = (r'/scale$', 'scales')
_TRAINED = {
    None: (_FROZEN, _NORMS, _WEIGHTS),
    'derived': (_FROZEN, _NORMS, _WEIGHTS),
    'learned': (_FROZEN, _NORMS, _SCALES, (r'/master$', 'weights')),
    'codes': (_FROZEN, _NORMS, _SCALES),
}


class Case(NamedTuple):
  """One way to train a model: what `training.job` was built from, and it."""

  config: model_config.ModelConfig
  settings: settings.Settings
  plan: dict[str, Any]
  job: job_lib.Job
  batch: dict[str, jax.Array]


class Stepper:
  """Takes one step a call; `lowered` is the program."""

  def __init__(self, step, case: Case):
    self._state, self._case = case.job.state, case
    self.lowered = step.lower(self._state, *self._rest)
    self._compiled = self.lowered.compile()

  def __call__(self):
    self._state, metrics = self._compiled(self._state, *self._rest)
    return metrics

  @property
  def _rest(self):
    return self._case.job.settled, self._case.job.teacher, self._case.batch


def add_flags(parser: argparse.ArgumentParser, **defaults) -> None:
  """Adds the sizes; keywords are their defaults for a CPU."""
  add = parser.add_argument
  add('--size', default='270m', help='variant of gemma_qat/model/config.py')
  add('--layers', type=int, help="instead of the size's own number; 0 for it")
  add('--vocabulary', type=int, help="instead of the size's; 0 for it")
  add('--tokens', type=int, help='a step')
  add('--length', type=int, default=512, help='tokens of a row')
  add('--dtype', default='auto', help='of the products')
  add('--remat', default='none', help='full, products or none')
  parser.set_defaults(**defaults)


def sizes(a: argparse.Namespace) -> model_config.ModelConfig:
  """Returns the config that the flags ask for."""
  config = model_config.variant(a.size)
  return dataclasses.replace(
      config,
      num_layers=a.layers or config.num_layers,
      vocab_size=a.vocabulary or config.vocab_size,
  )


def describe(a: argparse.Namespace) -> str:
  """Says the sizes of the flags, as `measure.emit` prints them."""
  config = sizes(a)
  return (
      f'{a.size}, {config.num_layers} layers, V {config.vocab_size:,}, '
      f'{a.tokens // a.length} x {a.length} tokens, '
      f'{resolved_dtype(a)}, remat {a.remat}'
  )


def resolved_dtype(a: argparse.Namespace) -> str:
  """Returns the dtype of the products, 'auto' resolved for this machine."""
  return machine.fast_dtype() if a.dtype == 'auto' else a.dtype


def make_case(a: argparse.Namespace, mode: str | None) -> Case:
  """Builds the step of a mode; of None the one without any quantization."""
  s = _settings(a, mode)
  config = sizes(a)
  params = draw(config)
  plan = student_lib.make_plan(config, s.quant) if mode else {}
  student = starts.init_student(config, params, plan, 'reference')
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  job = job_lib.prepare(
      s, mesh, random_weights.make(config), params, plan, student
  )
  rows = a.tokens // a.length, a.length
  tokens = np.random.default_rng(0).integers(3, config.vocab_size, rows)
  batch = {
      'tokens': tokens.astype(np.int32),
      'mask': np.arange(a.length)[None].repeat(rows[0], axis=0) > 0,
  }
  batch = jax.device_put(batch, sharding.named(mesh, ('batch', None)))
  return Case(config, s, plan, job, batch)


def draw(config: model_config.ModelConfig) -> dict[str, Any]:
  """Random weights with the spread of a checkpoint's, as `job` takes them."""
  generator, flat = np.random.default_rng(0), {}
  for path, spec in weights.tree_specs(config).items():
    spread = spec.row_length**-0.5 if spec.contraction else 0.1
    flat[path] = generator.standard_normal(spec.shape, np.float32)
    flat[path] *= np.float32(spread)
  return traverse_util.unflatten_dict(flat, sep='/')


def _settings(a, mode) -> settings.Settings:
  c = base_config.get_config().unlock()
  c.quant.start = 'reference'
  c.quant.modes = ((r'^embedding$', 'codes'), (r'.', mode or 'derived'))
  c.train.rules = _TRAINED[mode]
  c.compute.dtype = a.dtype
  c.compute.remat = a.remat
  return settings.read(c.lock())
