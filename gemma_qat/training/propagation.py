"""How is a layer rounded that reads what rounded layers before it wrote?

Layer after layer, and in a layer matrix after matrix: what a matrix will read
in the student, x', is no longer what it reads in the teacher, x. Its codes are
found for x', after its weights W were moved so that W' x' comes near W x:

  W' = W + share W E[(x - x') x'^T] E[x' x'^T]^-1

is the least-squares solution at a share of 1; less of it fits the text that was
read less closely. Source of the idea: Arai and Ichikawa, Quantization Error
Propagation; with a share of 0 it is GPTQ as Frantar et al. ran it.
"""

import functools
from typing import Any, Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from gemma_qat.model import layers
from gemma_qat.model import transformer
from gemma_qat.model import weights
from gemma_qat.quant import formats
from gemma_qat.quant import gptq
from gemma_qat.quant import lattice
from gemma_qat.quant import rules


def round_in_order(
    model: transformer.Transformer,
    params: Mapping[str, Any],
    embedding: Any,
    plan: Mapping[str, lattice.Entry],
    batches: Iterable[np.ndarray],
    share: float,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> dict[str, formats.Quantized]:
  """Finds the codes of all layers' matrices.

  Keeps the residual streams of all batches, of teacher and student: 8 bytes a
  token and channel. Matrices that the plan gives another format than q4_0
  take its own rounding; those it leaves alone stay the teacher's.

  Args:
    model: the network; what it intercepts with is not used.
    params: the teacher's tree.
    embedding: [V, D], the values that the student looks up.
    plan: from `student.make_plan`.
    batches: int [B, L] tokens each.
    share: of the error that is made up for, 0 .. 1.
    on_layer: called with the number of every layer that is done.

  Returns:
    Tree path -> codes and scales of the plan's matrices inside of layers,
    stacked as in the tree.
  """
  config = model.config
  flat = weights.unstack(config, params)
  entries = {
      name: lattice.Entry(*entry) for path, entry in plan.items()
      for name in weights.layer_names(config, path)
  }
  batches = list(batches)
  streams = [
      [np.asarray(transformer.embed(model, jnp.asarray(table[b])))
       for b in batches]
      for table in (np.asarray(params['embedding']), np.asarray(embedding))
  ]
  found = {}
  for layer in range(config.num_layers):
    prefix = f'layer_{layer}/'
    teacher = {
        n: jnp.asarray(flat[prefix + n], jnp.float32)
        for n in weights.layer_specs(config)
    }
    for n, weight in teacher.items():
      rules.check_finite(prefix + n, weight)
    student = dict(teacher)
    # Layers of the same attention share their compiled programs.
    alike = min(
        i for i in range(config.pattern)
        if config.is_global(i) == config.is_global(layer)
    )
    for first, readers in transformer.READERS.items():
      of = {n: entries[prefix + n] for n in readers if prefix + n in entries}
      rows = {
          n: teacher[n] for n, entry in of.items()
          if entry.format.stored_as == 'q4_0'
      }
      made = {
          n: entry.format.quantize(teacher[n], entry.contraction)
          for n, entry in of.items() if n not in rows
      }
      if rows:
        moments = _moments(model, alike, first, teacher, student, *streams)
        rules.check_finite(f'The inputs of {prefix}{first}', moments[0])
        made |= _round(rows, of[min(rows)].format, *moments, share)
      for n, quantized in made.items():
        found[prefix + n] = quantized
        student[n] = of[n].format.dequantize(quantized)
    streams = [
        [np.asarray(_output(model, alike, p, x)) for x in xs]
        for p, xs in zip((teacher, student), streams)
    ]
    on_layer(layer)
  return {
      path: _stacked(path, [
          found[n] for n in weights.layer_names(config, path)
      ])
      for path in plan if '/' in path
  }


def _moments(model, layer, first, teacher, student, teacher_xs, student_xs):
  """Means over tokens of x' x'^T and (x - x') x'^T, float32 [C, C]."""
  total, tokens = None, 0
  for x, seen in zip(teacher_xs, student_xs):
    found = _outer_products(model, layer, first, teacher, student, x, seen)
    total = found if total is None else jax.tree.map(jnp.add, total, found)
    tokens += x.shape[0] * x.shape[1]
  return [np.asarray(x) / tokens for x in total]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _outer_products(model, layer, first, teacher, student, x, seen):
  # Of the layer only what leads up to these inputs is computed.
  _, read = transformer.apply_layer(model, layer, teacher, x)
  _, student_read = transformer.apply_layer(model, layer, student, seen)
  x, seen = (
      y[first].reshape(x.shape[0] * x.shape[1], -1)
      for y in (read, student_read)
  )
  return (
      layers.cross_gram(seen, seen, model.dtype),
      layers.cross_gram(x - seen, seen, model.dtype),
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _output(model, layer, params, x):
  return transformer.apply_layer(model, layer, params, x)[0]


def _round(matrices, fmt, gram, lost, share):
  """{name: codes and scales} of matrices that read the same."""
  width = len(gram)
  rows = np.concatenate([
      np.asarray(x).reshape(-1, width) for x in matrices.values()
  ])
  if share:
    moved = scipy.linalg.solve(
        gptq.damped(gram), lost.astype(np.float64).T @ rows.T, assume_a='pos'
    )
    rows = rows + share * moved.T.astype(np.float32)
  made = gptq.gptq_q4_0(rows, gram, format=fmt)
  found, first = {}, 0
  for name, x in matrices.items():
    part = slice(first, first + x.size // width)
    found[name] = formats.Quantized(
        np.asarray(made.codes[part]).reshape(x.shape),
        np.asarray(made.scale[part]).reshape(*x.shape[:-1], -1),
    )
    first = part.stop
  return found


def _stacked(path, parts):
  if not path.startswith('groups/'):
    return parts[0]
  return formats.Quantized(*(np.stack(x) for x in zip(*parts)))
