"""How does a checkpoint become a network that runs in JAX?"""

import jax
import jax.numpy as jnp

from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.model import transformer
from gemma_qat.model import weights
from gemma_qat.training import machine


def load(checkpoint: checkpoints.Checkpoint, dtype: str = 'float32'):
  """Reads a checkpoint for inference.

  Codes and scales are dequantized first: what runs are the very numbers that
  the file stands for.

  Returns:
    (Transformer, params tree).
  """
  params = weights.stack(
      checkpoint.config, checkpoints.dequantized(checkpoint)
  )
  model = transformer.Transformer(
      checkpoint.config, dtype=jnp.dtype(dtype), remat='none',
      attention=machine.fast_attention(checkpoint.config, dtype),
  )
  return model, jax.tree.map(jnp.asarray, params)
