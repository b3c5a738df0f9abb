"""What suits the machine at hand?"""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat import devices
from gemma_qat import losses
from gemma_qat.model import attention
from gemma_qat.model import config as model_config
from gemma_qat.model import transformer


def make_model(
    config: model_config.ModelConfig,
    compute: Any,
    intercept: transformer.Intercept,
    constrain: transformer.Constrain = transformer.unconstrained,
) -> transformer.Transformer:
  """Builds the network that `settings.ComputeSettings` describe, here."""
  s = compute
  if s.attention == 'auto':
    s = dataclasses.replace(s, attention=fast_attention(config, s.dtype))
  return transformer.Transformer(
      config,
      intercept=intercept,
      constrain=constrain,
      dtype=jnp.dtype(s.dtype),
      residual_dtype=jnp.dtype(s.residual_dtype),
      remat=s.remat,
      attention=s.attention,
      round_embedding_multiplier=s.round_embedding_multiplier,
  )


@functools.cache
def fast_attention(config: model_config.ModelConfig, dtype: str) -> str:
  """Chooses the implementation of `model.attention.attend` for this machine.

  On a GPU, cuDNN is tried once for a model's heads; what it says instead of
  serving them goes to stderr.
  """
  backend = jax.default_backend()
  if backend == 'cpu':
    # Cut over several devices, 'mapped' would gather every head on each.
    return 'mapped' if jax.device_count() == 1 else 'blockwise'
  if backend != 'gpu':
    return 'blockwise'
  obstacle = attention.why_not_cudnn(
      config.num_heads, config.num_kv_heads, config.head_dim,
      config.sliding_window, dtype,
  )
  if obstacle is None:
    return 'cudnn'
  print(f'Attention in blocks, since cuDNN does not serve it: {obstacle}',
        file=sys.stderr, flush=True)
  return 'blockwise'


def kl_room(platform: str, kind: str) -> int:
  """Says how many bytes of exponentials the KL may keep at a time.

  A sixteenth of a known GPU's memory, 5 GB of an H100's: one round over the
  vocabulary in blocks of 8,192 instead of two in blocks of 2,048 took 22.9 ms
  for 29.6 there (4,096 tokens, D = 640). By what is published, not by what is
  free: several processes need the same program. Elsewhere, and for devices that
  are only described, `losses.ROOM`.

  Args:
    platform: of a `jax.Device`.
    kind: its `device_kind`.
  """
  known = devices.find(kind)
  if platform != 'gpu' or known is None:
    return losses.ROOM
  return max(losses.ROOM, known.memory_bytes // 16)


def fast_dtype() -> str:
  """Chooses bfloat16 products where the machine has instructions for them.

  Accelerators do; of x86 CPUs those with AVX512-BF16 or AMX (twice to five
  times the rate of float32). Elsewhere bfloat16 is emulated, slower than
  float32.
  """
  if jax.default_backend() != 'cpu':
    return 'bfloat16'
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as f:
      flags = f.read()
  except OSError:
    return 'float32'
  fast = 'avx512_bf16' in flags or 'amx_bf16' in flags
  return 'bfloat16' if fast else 'float32'
