"""How many floating-point operations does a training step ask for?

Counted from the sizes: a multiplication and an addition are two, products
alone (norms, softmax and quantization are under 1 %). What is computed twice to
save memory, or masked out afterwards, is not counted: divided by time and peak
this gives the model FLOPs utilisation that others report.
"""

import math

from gemma_qat.model import config as model_config
from gemma_qat.model import weights

# Products a step for each one of a forward pass: the teacher's, the student's,
# and the gradients of both factors of the student's.
PASSES = 4


def train_step(
    config: model_config.ModelConfig,
    batch: int,
    length: int,
    train_head: bool = False,
) -> float:
  """Counts one step of distillation, on all devices together.

  About 8 FLOPs a weight and token: 2 for the teacher, 6 for the student. The
  head's gradient, 2 of its 8, is only there when it is trained. (Layers whose
  scales alone are trained need the gradient of their weights all the same.)

  Args:
    config: the sizes.
    batch: rows a step, over all devices.
    length: tokens a row.
    train_head: whether the embedding is trained.
  """
  tokens = batch * length
  layers = 2 * PASSES * layer_weights(config) * tokens
  head = 2 * (PASSES if train_head else PASSES - 1) * tokens
  head *= config.vocab_size * config.embed_dim
  return layers + head + PASSES * attention_forward(config, batch, length)


def attention_forward(
    config: model_config.ModelConfig, batch: int, length: int
) -> float:
  """Counts queries times keys and weights times values in one forward pass.

  Only keys that a query sees: none that come later, in a local layer none out
  of the window.
  """
  pairs = sum(
      visible_pairs(
          length, None if config.is_global(i) else config.sliding_window
      )
      for i in range(config.num_layers)
  )
  return 4 * config.num_heads * config.head_dim * batch * pairs


def visible_pairs(length: int, window: int | None) -> int:
  """Counts the (query, key) pairs of a row in which the query sees the key."""
  seen = length if window is None else min(window, length)
  # The first `seen` queries see 1, 2, ... keys, the others `seen`.
  return seen * (seen + 1) // 2 + (length - seen) * seen


def layer_weights(config: model_config.ModelConfig) -> int:
  """Counts the weights of all layers' matrices."""
  return config.num_layers * sum(
      math.prod(spec.shape)
      for spec in weights.layer_specs(config).values() if spec.contraction
  )
