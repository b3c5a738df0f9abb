"""What is the student made of, and which part of it is trained?

The student is the teacher's tree in which every quantized weight is replaced
by what its mode trains (see `quant.lattice`). The plan says for each of them
the format and the mode; rules over the leaves say who is trained.
"""

from typing import Any, Mapping

from flax import traverse_util
import jax
import jax.numpy as jnp

from gemma_qat import errors
from gemma_qat import sharding
from gemma_qat.model import config as model_config
from gemma_qat.model import weights
from gemma_qat.quant import formats
from gemma_qat.quant import lattice
from gemma_qat.quant import low_rank
from gemma_qat.quant import rules
from gemma_qat.training import settings

Flat = Mapping[str, Any]

def make_plan(config: model_config.ModelConfig, s: settings.QuantSettings):
  """Decides the format and mode of every quantized weight.

  Returns:
    {tree path: (Format, mode, contraction)} as `lattice.make_intercept` takes
    it.

  Raises:
    UserError: a rule matches nothing, or names a vector of gains.
  """
  specs = weights.tree_specs(config)
  chosen = {p: f for p, f in rules.resolve(s.rules, specs).items() if f}
  modes = rules.resolve(s.modes, chosen)
  plan = {}
  for path, name in chosen.items():
    if not specs[path].contraction:
      raise errors.UserError(
          f'config.quant.rules gives {path} the format {name}, but it is a '
          'vector of gains: formats are for matrices. Narrow the rule.'
      )
    if path not in modes:
      raise errors.UserError(
          f'config.quant.modes says nothing of {path}: add a rule for it.'
      )
    fmt = formats.get(name)
    if s.bf16_safe_scales:
      fmt = formats.bf16_safe(fmt)
    plan[path] = (fmt, modes[path], specs[path].contraction)
  return plan


def abstract_student(config: model_config.ModelConfig, plan) -> dict:
  """Returns the shapes of a student's tree; nothing is computed."""
  def node(path, leaf):
    if path not in plan:
      return leaf
    make = lambda weight: lattice.init_node(
        weight, *plan[path], stacked=path.startswith('groups/')
    )
    return jax.eval_shape(make, leaf)
  return traverse_util.unflatten_dict(
      {path: node(path, x) for path, x in abstract_flat(config).items()},
      sep='/',
  )


def abstract_flat(config: model_config.ModelConfig) -> dict:
  """Returns the shapes of a teacher's float32 leaves by path."""
  return {
      path: jax.ShapeDtypeStruct(spec.shape, jnp.float32)
      for path, spec in weights.tree_specs(config).items()
  }


def outline(config: model_config.ModelConfig, plan) -> dict:
  """Returns the student's tree with None for every leaf.

  Enough for `groups` to judge the training rules before the student is made.
  """
  tree = {path: None for path in weights.tree_specs(config)}
  for path, (_, mode, _) in plan.items():
    if lattice.parts(mode):
      tree[path] = dict.fromkeys(lattice.parts(mode))
  return traverse_util.unflatten_dict(tree, sep='/')


def groups(student: Mapping[str, Any], train_rules: settings.Rules):
  """Says which leaves are trained: {leaf path: group}.

  Raises:
    UserError: a rule matches nothing, nothing is trained, or a rule trains
      codes, which have no gradient.
  """
  flat = traverse_util.flatten_dict(student, sep='/')
  chosen = {p: g for p, g in rules.resolve(train_rules, flat).items() if g}
  for path in chosen:
    if path.endswith('/codes'):
      raise errors.UserError(
          f'config.train.rules trains {path}: codes have no gradient. Train '
          "their scales, or give the weight the mode 'learned' or 'derived'."
      )
  if not chosen:
    raise errors.UserError('config.train.rules trains nothing.')
  return chosen


def split(student: Mapping[str, Any], trained: Flat):
  """Parts the tree into (trained, frozen) flat dicts by path."""
  flat = traverse_util.flatten_dict(student, sep='/')
  return (
      {p: x for p, x in flat.items() if p in trained},
      {p: x for p, x in flat.items() if p not in trained},
  )


def join(trained: Flat, frozen: Flat) -> dict:
  """Undoes `split`."""
  return traverse_util.unflatten_dict({**frozen, **trained}, sep='/')


def settle(frozen: Flat, plan, dequantize=None):
  """Dequantizes once and for all what no step will change.

  A node without a trained part would be dequantized anew in every step; the
  embedding alone is 170 to 1,400 million weights.

  Args:
    frozen: the frozen leaves by path.
    plan: from `make_plan`.
    dequantize: what makes a plain array of (format, codes, scale), by default
      `Format.dequantize`.

  Returns:
    (frozen leaves, plan) in which such nodes are plain arrays of mode 'fixed'.
  """
  if dequantize is None:
    dequantize = lambda fmt, *node: fmt.dequantize(formats.Quantized(*node))
  frozen, plan = dict(frozen), dict(plan)
  for path, (fmt, mode, contraction) in list(plan.items()):
    node = [p for p in (path + '/codes', path + '/scale') if p in frozen]
    if mode == 'codes' and len(node) == 2:
      codes, scale = (frozen.pop(p) for p in node)
      frozen[path] = dequantize(fmt, codes, scale)
      plan[path] = (fmt, 'fixed', contraction)
  return frozen, plan


def shardings(mesh, config: model_config.ModelConfig, flat: Flat) -> dict:
  """Derives where each leaf lies from its weight's declared axes.

  Raises:
    UserError: the mesh would cut a block or an axis unevenly.
  """
  specs = weights.tree_specs(config)
  placed = {}
  for path, leaf in flat.items():
    weight = path if path in specs else path.rpartition('/')[0]
    axes = specs[weight].axes
    part = path.rpartition('/')[2]
    if part in ('lora_a', 'lora_b'):
      axes = low_rank.axes(part, axes, specs[weight].contraction)
    # Per-channel scales keep contracted axes as ones: nothing to cut there.
    axes = tuple(
        a if size > 1 else 'norm' for a, size in zip(axes, leaf.shape)
    )
    is_block = path.endswith(('/codes', '/master'))
    sharding.check(mesh, path, leaf.shape, axes, block=32 if is_block else 1)
    placed[path] = sharding.named(mesh, axes)
  return placed
