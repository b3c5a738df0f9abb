"""Where do a student's codes start?"""

import functools
import types
from typing import Any, Callable, Mapping
import zlib

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.model import config as model_config
from gemma_qat.model import weights
from gemma_qat.quant import formats
from gemma_qat.quant import gptq
from gemma_qat.quant import lattice
from gemma_qat.quant import rules
from gemma_qat.quant import search
from gemma_qat.training import settings

# Rounding to four bits moves a matrix by a tenth of its norm; two matrices that
# have nothing to do with one another are 1.4 apart.
_FARTHEST = 0.5

# The embedding is looked up, too, where its errors count in all directions, not
# only in those that the head reads. Of 0.01, 0.1, 0.3 and 1 the best for both.
_LOOKED_UP = 0.1

# One program for each shape: operation by operation tiny takes a minute.
_init_node = jax.jit(
    lattice.init_node, static_argnums=(1, 2, 3),
    static_argnames=('stacked', 'seed'),
)


def init_student(
    config: model_config.ModelConfig,
    params: Mapping[str, Any],
    plan,
    start: str,
    grams: Mapping[str, Any] | None = None,
    on_weight: Callable[[str], None] = lambda path: None,
    found: Mapping[str, formats.Quantized] = types.MappingProxyType({}),
) -> dict:
  """Makes the student at step 0.

  Args:
    config: the sizes.
    params: the teacher's tree, float32.
    plan: from `student.make_plan`.
    start: see `settings.QuantSettings.start`.
    grams: tree path -> [..., C, C] second moments of the weight's inputs, for
      the starts that need them; from `calibration.gather_grams`.
    on_weight: called with each path as it is done.
    found: tree path -> codes and scales of weights that have them already.

  Returns:
    The student's tree.
  """
  specs = weights.tree_specs(config)
  check_start(plan, start)
  tree = {}
  for path, leaf in traverse_util.flatten_dict(params, sep='/').items():
    rules.check_finite(path, leaf)
    if path not in plan:
      tree[path] = np.asarray(leaf, np.float32)
      continue
    fmt, mode, contraction = plan[path]
    gram = None if grams is None else grams.get(path)
    more = _more(path, specs[path])
    made = found.get(path)
    if made is None and gram is not None:
      made = coordinated(path, leaf, specs[path], gram, start, fmt)
    if made is not None and fmt.stored_as == 'q4_0':
      tree[path] = _node(leaf, fmt, mode, contraction, *made, more)
    else:
      tree[path] = _init_node(leaf, fmt, mode, contraction, **more)
    on_weight(path)
  return traverse_util.unflatten_dict(tree, sep='/')


def follow(
    config: model_config.ModelConfig,
    params: Mapping[str, Any],
    plan,
    model: checkpoints.Checkpoint,
) -> dict:
  """Makes the student at step 0 from the codes and scales of another model.

  Gains come from there, too: they were trained with these codes. What is not
  quantized otherwise is the teacher's.

  Args:
    config: the sizes.
    params: the teacher's tree, float32.
    plan: from `student.make_plan`.
    model: of the same sizes, the same weights in the same formats.

  Raises:
    UserError: other sizes, or a weight in another format.
  """
  check_followed(config, plan, model)
  specs = weights.tree_specs(config)
  tree = {}
  for path, leaf in traverse_util.flatten_dict(params, sep='/').items():
    found = [model.weights[n] for n in weights.layer_names(config, path)]
    join = np.stack if specs[path].is_stacked else (lambda xs: xs[0])
    if path in plan:
      fmt, mode, contraction = plan[path]
      codes, scale = (
          join([np.asarray(w.quantized[i]) for w in found]) for i in (0, 1)
      )
      tree[path] = _node(
          leaf, fmt, mode, contraction, codes, scale, _more(path, specs[path])
      )
    elif specs[path].contraction:
      tree[path] = np.asarray(leaf, np.float32)
    else:
      tree[path] = join([checkpoints.to_float32(w) for w in found])
  return traverse_util.unflatten_dict(tree, sep='/')


def check_followed(config, plan, model) -> None:
  """Refuses a model that `follow` cannot take, without reading its weights.

  Raises:
    UserError: see `follow`.
  """
  ask = f'config.quant.start={model.source}'
  sizes = lambda c: [(n, s.shape) for n, s in weights.by_layer_specs(c).items()]
  if sizes(model.config) != sizes(config):
    raise errors.UserError(
        f'{ask} is a {model.config.variant} of other sizes than '
        'config.model.checkpoint: take a model that was made from it.'
    )
  for path, (fmt, _, _) in plan.items():
    for name in weights.layer_names(config, path):
      found = model.weights.entries[name].format
      if found != fmt.stored_as:
        raise errors.UserError(
            f'{ask} holds {name} as {model.weights.entries[name].type}, but '
            f'config.quant.rules asks for {fmt.stored_as}: take another file, '
            'or the same rules.'
        )


def check_start(plan, start: str) -> None:
  """Refuses, before any work, a start that a mode of the plan cannot take.

  Raises:
    UserError: the start finds scales, a mode derives its own.
  """
  if start != 'reference' and any(m == 'derived' for _, m, _ in plan.values()):
    raise errors.UserError(
        f"config.quant.start={start} finds scales, but the mode 'derived' "
        "computes its own from the weights at every step: use the mode "
        "'learned' or 'codes', or start='reference'."
    )


def check_made(
    config: model_config.ModelConfig,
    params: Mapping[str, Any],
    student: Mapping[str, Any],
    plan,
    start: str,
) -> None:
  """Refuses a student that is no quantized form of its teacher.

  What is not quantized is the teacher's to the bit, so that the student without
  its fake quantization would be the teacher; what is lies near it.

  Args:
    config: the sizes.
    params: the teacher's tree, float32.
    student: of `init_student` or `follow`, unless channels were folded.
    plan: from `student.make_plan`.
    start: see `settings.QuantSettings.start`.

  Raises:
    UserError: names the weight that is another one.
  """
  specs = weights.tree_specs(config)
  leaves = traverse_util.flatten_dict(student, sep='/')
  for path, weight in traverse_util.flatten_dict(params, sep='/').items():
    if path in plan:
      parts = lattice.parts(plan[path][1])
      node = {p: leaves[f'{path}/{p}'] for p in parts} or leaves[path]
      far = float(_distance(node, weight, *plan[path]))
    elif specs[path].contraction or start in settings.STARTS:
      far = float(not np.array_equal(leaves[path], weight))
    else:
      continue  # Gains of another model, trained with its codes.
    if not far <= _FARTHEST:
      raise errors.UserError(
          f'The student begins with {path} {far:.0%} away from the weights of '
          f'config.model.checkpoint (config.quant.start={start}): the two are '
          'not the same model.'
      )


def coordinated(
    path: str,
    weight,
    spec: weights.WeightSpec,
    gram,
    start: str,
    fmt: formats.Format,
) -> formats.Quantized | None:
  """Finds codes and scales from activation statistics, layer by layer.

  Args:
    path: of the weight in the tree.
    weight: [..., last], stacked or not.
    spec: of the weight.
    gram: [..., C, C], see `init_student`.
    start: 'search' or 'gptq'.
    fmt: the format.

  Returns:
    Codes and scales as in `formats.Quantized`; None where the start or the
    format has no use for statistics.
  """
  if start == 'reference' or fmt.stored_as != 'q4_0':
    return None
  rows = np.asarray(weight, np.float32).reshape(
      (weight.shape[0] if spec.is_stacked else 1), -1, spec.row_length
  )
  damping = _LOOKED_UP if path == 'embedding' else gptq.DAMPING
  codes, scale = [], []
  for w, g in zip(rows, gram if spec.is_stacked else [gram], strict=True):
    if start == 'search':
      found = search.search_q4_0(w, np.diagonal(g), fmt)
    else:
      found = gptq.gptq_q4_0(w, g, damping, format=fmt)
    codes.append(np.asarray(found.codes))
    scale.append(np.asarray(found.scale))
  blocks = weight.shape[:-1] + (weight.shape[-1] // 32,)
  return formats.Quantized(
      np.stack(codes).reshape(weight.shape), np.stack(scale).reshape(blocks)
  )


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _distance(node, weight, fmt, mode, contraction):
  """Of what the forward pass sees from the weight, relative to the weight."""
  values = node if mode == 'fixed' else fmt.dequantize(
      lattice.quantized(node, fmt, mode, contraction)
  )
  return jnp.sqrt(
      jnp.sum(jnp.square(values - weight))
      / jnp.maximum(jnp.sum(jnp.square(weight)), 1e-30)
  )


def _more(path, spec):
  """What `init_node` wants to know beside: every weight has another draw."""
  return {'stacked': spec.is_stacked, 'seed': zlib.crc32(path.encode())}


def _node(weight, fmt, mode, contraction, codes, scale, more):
  """A node that starts at given codes, whatever its mode trains."""
  if mode == 'codes':
    return lattice.init_node(
        weight, fmt, mode, contraction, scale=scale, codes=codes
    )
  # The point nearest to the original weight that rounds to these codes. 0.45
  # of a step, not 0.5: the first updates should not all flip codes.
  values = np.asarray(fmt.dequantize(formats.Quantized(codes, scale)))
  reach = 0.45 * np.repeat(np.abs(scale), fmt.block, axis=-1)
  master = values + np.clip(weight - values, -reach, reach)
  return lattice.init_node(
      master, fmt, mode, contraction, scale=scale, **more
  )
