"""Claim: kept small, the optimizer's state lets full QAT of 4B fit 80 GB.

Compiles the whole training step of a size, every weight trained, for each way
of keeping the state, and asks the compiler what it needs. Nothing is allocated:
the arguments are shapes. One line of JSON for each setting:

  python benchmarks/optimizer_memory.py --size=4b --batch=8 --accumulate=8

`arguments_gb` (state, teacher, batch) is exact on every device. The state's
outputs lie where its arguments do (donation), so `total_gb` is arguments and
temporaries. Temporaries are those of the backend that compiles; a CPU's are a
stand-in for a GPU's: it has no bfloat16 products and widens their operands.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp

from experiments.configs import base
from gemma_qat import compiled
from gemma_qat.model import config as model_config
from gemma_qat.model import transformer
from gemma_qat.model import weights
from gemma_qat.quant import lattice
from gemma_qat.training import machine
from gemma_qat.training import optimizer as optimizer_lib
from gemma_qat.training import settings
from gemma_qat.training import step as step_lib
from gemma_qat.training import student as student_lib

# By default a CPU runs side by side what it can, whatever memory that takes;
# GPUs do one thing after the other.
_OPTIONS = {
    **compiled.NO_LIBRARIES,
    'xla_cpu_enable_concurrency_optimized_scheduler': False,
}

STATES = {
    'float32': ('adam', 'float32'),
    'bfloat16': ('adam', 'bfloat16'),
    'int8': ('adam', 'int8'),
    'adafactor': ('adafactor', 'float32'),
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--size', default='270m')
  parser.add_argument('--states', nargs='+', default=list(STATES))
  parser.add_argument('--mode', default='learned', choices=lattice.MODES)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--length', type=int, default=1024)
  parser.add_argument('--accumulate', type=int, default=1)
  parser.add_argument('--attention', default='mapped')
  a = parser.parse_args()
  sizes = model_config.variant(a.size)
  for name in a.states:
    print(json.dumps({
        'what': f'{a.size}, {name}, {a.mode}, {a.batch} x {a.length} tokens '
                f'in {a.accumulate}',
        'backend': jax.default_backend(),
        **analyse(sizes, configure(a, *STATES[name])),
    }), flush=True)


def configure(a, optimizer: str, moments: str) -> settings.Settings:
  """The base config with every weight quantized in one mode and trained."""
  c = base.get_config().unlock()
  c.quant.modes = ((r'.', a.mode),)
  c.quant.start = 'reference'
  c.train.batch_size, c.train.length = a.batch, a.length
  c.train.accumulate = a.accumulate
  scales = ((r'/scale$', 'scales'),) if a.mode == 'learned' else ()
  c.train.rules = (*scales, (r'norm$', 'norms'), (r'.', 'weights'))
  c.optimizer.name, c.optimizer.moments = optimizer, moments
  c.compute.dtype, c.compute.remat = 'bfloat16', 'full'
  c.compute.attention = a.attention
  return settings.read(c.lock())


def analyse(sizes: model_config.ModelConfig, s: settings.Settings):
  """Compiles one step and returns the compiler's figures."""
  start = time.monotonic()
  plan = student_lib.make_plan(sizes, s.quant)
  student, teacher = abstract_student(sizes, plan), abstract_teacher(sizes)
  groups = student_lib.groups(student, s.train.rules)
  trained, frozen = student_lib.split(student, groups)
  optimizer = optimizer_lib.make_optimizer(s.optimizer, s.train.steps, groups)
  state = jax.eval_shape(
      lambda t: step_lib.init_state(t, optimizer), trained
  )
  loss = step_lib.make_loss(
      machine.make_model(sizes, s.compute, lattice.make_intercept(plan)),
      machine.make_model(sizes, s.compute, transformer.identity),
      s.compute.kl_block, train_head=True,
  )
  step = step_lib.make_step(loss, optimizer, groups, s.train.accumulate)
  shape = (s.train.batch_size, s.train.length)
  batch = {
      'tokens': jax.ShapeDtypeStruct(shape, jnp.int32),
      'mask': jax.ShapeDtypeStruct(shape, jnp.bool_),
  }
  lowered = jax.jit(step, donate_argnums=0).lower(
      state, frozen, teacher, batch
  )
  found = compiled.compile_to_ask(lowered, _OPTIONS).memory_analysis()
  count = sum(x.size for x in jax.tree.leaves(teacher))
  return {
      'weights': count,
      'optimizer_bytes_a_weight': round(_bytes(state.optimizer) / count, 3),
      'optimizer_gb': _gb(_bytes(state.optimizer)),
      'arguments_gb': _gb(found.argument_size_in_bytes),
      'temporaries_gb': _gb(found.temp_size_in_bytes),
      'not_donated_gb': _gb(
          found.output_size_in_bytes - found.alias_size_in_bytes
      ),
      'total_gb': _gb(
          found.argument_size_in_bytes + found.temp_size_in_bytes
          + found.output_size_in_bytes - found.alias_size_in_bytes
      ),
      'seconds': round(time.monotonic() - start),
  }


def abstract_student(sizes, plan):
  """Shapes of the student's tree, everything trained in float32."""
  flat = {
      path: jax.ShapeDtypeStruct(spec.shape, jnp.float32)
      for path, spec in weights.tree_specs(sizes).items()
  }
  for path, entry in plan.items():
    flat[path] = jax.eval_shape(
        lambda w, e=entry: lattice.init_node(w, *e), flat[path]
    )
  return student_lib.join(flat, {})


def abstract_teacher(sizes):
  """Shapes of the teacher's tree: matrices in bfloat16, gains in float32."""
  return student_lib.join({
      path: jax.ShapeDtypeStruct(
          spec.shape, jnp.bfloat16 if spec.contraction else jnp.float32
      ) for path, spec in weights.tree_specs(sizes).items()
  }, {})


def _bytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _gb(count):
  return round(count / 1e9, 3)


if __name__ == '__main__':
  main()
