"""Is the run's configuration complete, consistent and understood?

A ConfigDict is what a user edits; it stops here. Below the loop there are only
these frozen values.
"""

import dataclasses
import functools
import sys
from typing import Mapping, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from gemma_qat import errors
from gemma_qat.model import attention
from gemma_qat.model import config as model_config
from gemma_qat.model import transformer
from gemma_qat.quant import formats
from gemma_qat.quant import lattice
from gemma_qat.training import moments

Rules = tuple[tuple[str, str | None], ...]


@dataclasses.dataclass(frozen=True)
class QuantSettings:
  """Which weights take which format, how, and where they start.

  Attributes:
    rules: ordered (regex, format name); None leaves a weight as it is.
    modes: ordered (regex, mode of `quant.lattice`) for the quantized ones.
    start: 'reference' (the format's own rounding), 'search' (block by block,
      importance-weighted least squares) or 'gptq' (rounding coordinated over
      a row).
    calibration_tokens: how many training tokens the teacher reads for the
      activation statistics of 'search' and 'gptq'.
    bf16_safe_scales: whether Q4_0 scales keep to values that bfloat16 holds
      too, at the start and in training. Files with bfloat16 scales (MLX,
      compressed-tensors) are exact then. So are bfloat16 values that ggml's
      reference rule quantizes anew, as long as every block uses code 0
      (`quant.anchored`): all starts see to that, and it stays so in the modes
      'codes', 'derived' and 'fixed'. 'learned' may lose a block's code 0;
      then only codes and scales written as they are keep it. Other formats,
      such as a Q8_0 embedding, are not restricted.
  """

  rules: Rules
  modes: Rules
  start: str
  calibration_tokens: int
  bf16_safe_scales: bool


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """How the trained leaves move.

  Attributes:
    name: 'adam' or 'adafactor' (factored second moment, no first one: see
      `optimizer`).
    moments: how Adam keeps its two moments between steps, one of
      `moments.KINDS`: 'float32' (8 bytes a weight), 'bfloat16' (4) or 'int8'
      (2.1). Adafactor's are float32.
    learning_rate: peak rate; a group's own is this times its multiplier.
    multipliers: group -> factor; the groups are what `train.rules` assigns.
    warmup_steps: linear from 0; cosine to 0 at the last step follows.
    clip: largest global gradient norm of a group; 0 for none.
    b1, b2, epsilon: of Adam. Adafactor has no b1, its decay never exceeds b2.
  """

  name: str
  moments: str
  learning_rate: float
  multipliers: Mapping[str, float]
  warmup_steps: int
  clip: float
  b1: float
  b2: float
  epsilon: float


@dataclasses.dataclass(frozen=True)
class ComputeSettings:
  """How the network is computed; see `model.transformer.Transformer`.

  `attention` may still be 'auto': the choice takes the sizes of the model.
  """

  dtype: str
  residual_dtype: str
  remat: str
  attention: str
  round_embedding_multiplier: bool
  kl_block: int


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """How long, on how much, and what is trained.

  Attributes:
    steps: optimizer steps.
    batch_size: rows a step, over all devices.
    accumulate: parts that a batch is computed in, one after the other; their
      gradients are summed. Activations take the memory of one part, the step
      is that of the whole batch.
    length: tokens a row.
    rules: ordered (regex over the student's leaves, group); None freezes.
    checkpoint_every, evaluate_every, log_every: in steps.
    keep: checkpoints kept.
    heldout_batches: batches of held-out text that `evaluate_every` scores.
  """

  steps: int
  batch_size: int
  accumulate: int
  length: int
  rules: Rules
  checkpoint_every: int
  evaluate_every: int
  log_every: int
  keep: int
  heldout_batches: int


@dataclasses.dataclass(frozen=True)
class MeshSettings:
  """How the devices are arranged.

  Attributes:
    data, fsdp, tensor: see `sharding.make_mesh`.
    gather: what of a weight travels between devices, see
      `training.gathering`.
  """

  data: int
  fsdp: int
  tensor: int
  gather: str


class Settings(NamedTuple):
  """The frozen settings of a run, by config section."""

  quant: QuantSettings
  train: TrainSettings
  optimizer: OptimizerSettings
  compute: ComputeSettings
  mesh: MeshSettings


def read(config: ml_collections.ConfigDict) -> Settings:
  """Checks and freezes all of a config that the loop needs."""
  return Settings(
      quant(config), train(config), optimizer(config), compute(config),
      mesh(config),
  )


def mesh(config: ml_collections.ConfigDict) -> MeshSettings:
  """Checks and freezes `config.mesh`."""
  s = MeshSettings(**config.mesh.to_dict())
  _choice('config.mesh.gather', s.gather, ('weights', 'codes'))
  return s


def quant(config: ml_collections.ConfigDict) -> QuantSettings:
  """Checks and freezes `config.quant`."""
  s = QuantSettings(
      rules=_rules(config.quant.rules),
      modes=_rules(config.quant.modes),
      start=config.quant.start,
      calibration_tokens=config.quant.calibration_tokens,
      bf16_safe_scales=config.quant.bf16_safe_scales,
  )
  for _, name in s.rules:
    if name is not None:
      formats.get(name)
  if s.bf16_safe_scales and 'q4_0' not in dict(s.rules).values():
    raise errors.UserError(
        'config.quant.bf16_safe_scales restricts the scales of q4_0, which no '
        'rule of config.quant.rules gives: turn it off, or add such a rule.'
    )
  _choice('config.quant.start', s.start, ('reference', 'search', 'gptq'))
  for _, mode in s.modes:
    _choice('config.quant.modes', mode, lattice.MODES)
  return s


def optimizer(config: ml_collections.ConfigDict) -> OptimizerSettings:
  """Checks and freezes `config.optimizer`."""
  values = config.optimizer.to_dict()
  s = OptimizerSettings(**values)
  _choice('config.optimizer.name', s.name, ('adam', 'adafactor'))
  _choice('config.optimizer.moments', s.moments, moments.KINDS)
  if s.name == 'adafactor' and s.moments != 'float32':
    raise errors.UserError(
        f'config.optimizer.moments={s.moments} is for adam: adafactor keeps '
        'sums of rows and columns in float32, which take next to nothing. Set '
        "it to 'float32', or config.optimizer.name to 'adam'."
    )
  if s.moments == 'int8' and s.b1**2 >= s.b2:
    raise errors.UserError(
        f'config.optimizer.moments=int8 needs b1^2 < b2, not b1={s.b1} and '
        f'b2={s.b2}: only then is the first moment bounded by the root of the '
        'second, in units of which it is kept. Lower b1 or raise b2.'
    )
  if s.warmup_steps >= config.train.steps:
    raise errors.UserError(
        f'config.optimizer.warmup_steps={s.warmup_steps} leaves nothing of '
        f'config.train.steps={config.train.steps}: lower it.'
    )
  return s


def train(config: ml_collections.ConfigDict) -> TrainSettings:
  """Checks and freezes `config.train`."""
  values = config.train.to_dict()
  s = TrainSettings(**(values | {'rules': _rules(config.train.rules)}))
  for field in dataclasses.fields(s):
    value = getattr(s, field.name)
    if field.name != 'rules' and value < 1:
      raise errors.UserError(f'config.train.{field.name}={value} is below 1.')
  if s.batch_size % s.accumulate:
    raise errors.UserError(
        f'config.train.accumulate={s.accumulate} does not divide '
        f'config.train.batch_size={s.batch_size}: change one of them.'
    )
  unknown = {g for _, g in s.rules if g} - set(config.optimizer.multipliers)
  if unknown:
    raise errors.UserError(
        f'config.train.rules names the group {min(unknown)!r}, which '
        'config.optimizer.multipliers does not have: add it there.'
    )
  return s


def compute(config: ml_collections.ConfigDict) -> ComputeSettings:
  """Checks and freezes `config.compute`; resolves the 'auto' of the dtype."""
  s = ComputeSettings(**config.compute.to_dict())
  if s.dtype == 'auto':
    s = dataclasses.replace(s, dtype=fast_dtype())
  _choice('config.compute.dtype', s.dtype, ('bfloat16', 'float32'))
  _choice('config.compute.residual_dtype', s.residual_dtype,
          ('bfloat16', 'float32'))
  _choice('config.compute.attention', s.attention,
          ('auto', *attention.IMPLEMENTATIONS))
  if s.attention == 'cudnn' and s.dtype != 'bfloat16':
    raise errors.UserError(
        f"config.compute.attention='cudnn' does not compute in {s.dtype}: set "
        "config.compute.dtype='bfloat16', or attention='auto'."
    )
  transformer.remat_policy(s.remat)
  return s


def make_model(
    config: model_config.ModelConfig,
    compute_settings: ComputeSettings,
    intercept: transformer.Intercept,
    constrain: transformer.Constrain = transformer.unconstrained,
) -> transformer.Transformer:
  """Builds the network that these settings describe, here."""
  s = compute_settings
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


def _choice(field, value, allowed):
  if value not in allowed:
    raise errors.UserError(
        f'{field}: {value!r} is not one of {", ".join(allowed)}.'
    )


def _rules(rules) -> Rules:
  return tuple((pattern, value) for pattern, value in rules)
