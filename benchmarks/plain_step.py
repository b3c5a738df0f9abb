"""Claim: our step against what one would write first in plain JAX.

The other step sends the whole tree through fake quantization before the model,
multiplies with the whole head and takes the KL of materialised logits. The
model, the optimizer, what is trained and what is recomputed are the same.

  python -m benchmarks.plain_step
  python -m benchmarks.plain_step --size=1b --layers=0 --vocabulary=0 \
      --tokens=4096 --length=1024 --remat=products
"""

from flax import traverse_util
import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks import training_step
from gemma_qat import losses
from gemma_qat.model import transformer
from gemma_qat.model import weights
from gemma_qat.quant import lattice
from gemma_qat.training import machine
from gemma_qat.training import optimizer as optimizer_lib
from gemma_qat.training import step as step_lib
from gemma_qat.training import student as student_lib


def main(argv=None):
  parser = measure.make_parser(__doc__, repeats=5)
  parser.add_argument(
      '--mode', default='derived', choices=training_step.MODES
  )
  training_step.add_flags(parser, layers=6, vocabulary=65_536, tokens=512)
  a = parser.parse_args(argv)
  case = training_step.make_case(a, a.mode)
  ours = training_step.Stepper(case.job.program.step, case)
  # Its own arrays, for every step overwrites the state that it is given.
  case = training_step.make_case(a, a.mode)
  other = training_step.Stepper(make_plain_step(case), case)
  measure.emit(
      f'training step, {a.mode}, against plain JAX',
      training_step.describe(a),
      measure.interleave(ours, other, a.repeats),
      ours_temporary_gb=measure.temporary_gb(ours.lowered),
      other_temporary_gb=measure.temporary_gb(other.lowered),
  )


def make_plain_step(case: training_step.Case):
  """Builds the other step, with the signature of `job.step`."""
  _, plan = student_lib.settle(case.job.frozen, case.plan)
  s = case.settings
  intercept = lattice.make_intercept(plan)
  model = machine.make_model(case.config, s.compute, transformer.identity)

  def logits(tree, tokens):
    hidden = model.apply({'params': tree}, tokens)
    return transformer.unembed(hidden, tree['embedding'], model.dtype)

  def loss(student, teacher, batch):
    quantized = _whole_tree(case.config, intercept, student)
    kl = losses.kl_from_logits(
        logits(quantized, batch['tokens']), logits(teacher, batch['tokens'])
    )
    total = jnp.sum(kl * batch['mask'])
    return step_lib.Sums(total, total, jnp.sum(batch['mask']))

  trained = case.job.state.trained
  groups = student_lib.groups(
      student_lib.join(trained, case.job.settled), s.train.rules
  )
  optimizer = optimizer_lib.make_optimizer(s.optimizer, s.train.steps, groups)
  return jax.jit(
      step_lib.make_step(loss, optimizer, groups), donate_argnums=0
  )


def _whole_tree(config, intercept, tree):
  flat = {}
  for path in weights.tree_specs(config):
    node = tree
    for key in path.split('/'):
      node = node[key]
    flat[path] = intercept(path, node)
  return traverse_util.unflatten_dict(flat, sep='/')


if __name__ == '__main__':
  main()
