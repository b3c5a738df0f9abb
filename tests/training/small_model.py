"""The model and the batch that the tests of this room train."""

import dataclasses
import zlib

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.model import config as model_config
from gemma_qat.model import transformer
from gemma_qat.model import weights
from gemma_qat.quant import formats
from gemma_qat.quant import lattice
from gemma_qat.training import settings
from gemma_qat.training import starts
from gemma_qat.training import student as student_lib

# Two scanned groups of one (global) layer each: seconds sooner compiled than
# tiny's six. What layers do to each other is tested with the model.
CONFIG = dataclasses.replace(
    model_config.variant('tiny'), num_layers=2, pattern=1, vocab_size=128
)
MATRICES = r'(attn_[qkvo]|mlp_(gate|up|down))$'
RULES = ((MATRICES, 'q4_0'), (r'^embedding$', 'q8_0'))
BATCH = {
    'tokens': np.random.default_rng(0).integers(3, 128, (8, 20), np.int32),
    'mask': np.arange(20)[None].repeat(8, axis=0) > 0,
}


def make_params() -> dict:
  """Draws the teacher's tree, float32."""
  flat = {}
  for name, spec in weights.by_layer_specs(CONFIG).items():
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    spread = spec.row_length**-0.5 if spec.contraction else 0.1
    flat[name] = draw.standard_normal(spec.shape, np.float32)
    flat[name] *= np.float32(spread)
  return weights.stack(CONFIG, flat)


def make_plan(
    rules=RULES, modes=((r'.', 'codes'),), bf16_safe_scales=False
) -> dict:
  """Plans formats and modes of the small model."""
  return student_lib.make_plan(CONFIG, settings.QuantSettings(
      rules=rules, modes=modes, start='reference', calibration_tokens=160,
      fold=False, error_propagation=0.0, straight_through='auto',
      bf16_safe_scales=bf16_safe_scales,
  ))


def make_plan_of(mode: str, bf16_safe_scales=False) -> dict:
  """Plans one mode for the layers; the embedding's codes stand still."""
  modes = (r'^embedding$', 'codes'), (r'.', mode)
  return make_plan(modes=modes, bf16_safe_scales=bf16_safe_scales)


def make_model(plan=None) -> transformer.Transformer:
  """Builds the network; with a plan the student's, without the teacher's."""
  intercept = lattice.make_intercept(plan) if plan else transformer.identity
  return transformer.Transformer(
      CONFIG, intercept, dtype=jnp.float32, remat='none', attention='mapped'
  )


def init_student(params, plan, start='reference', grams=None) -> dict:
  """Makes the student of step 0."""
  return starts.init_student(CONFIG, params, plan, start, grams)


def flat(tree) -> dict:
  """Returns {leaf path: leaf}."""
  return traverse_util.flatten_dict(tree, sep='/')


def nested(flat) -> dict:
  """Undoes `flat`."""
  return traverse_util.unflatten_dict(flat, sep='/')


def node(tree, path: str):
  """Returns what stands at a path."""
  for key in path.split('/'):
    tree = tree[key]
  return tree


def stored(tree, path: str, entry) -> formats.Quantized:
  """Returns the codes and scales that a file gets of one weight."""
  # A fixed node is compared with its own values, which jit cannot do.
  quantized = lattice.quantized if entry[1] == 'fixed' else _quantized
  return quantized(node(tree, path), *entry)


_quantized = jax.jit(lattice.quantized, static_argnums=(1, 2, 3))
# The formats' own rules, all codes standing still.
PLAN = make_plan()
