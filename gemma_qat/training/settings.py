"""Is the run's configuration complete, consistent and understood?

A ConfigDict is what a user edits; it stops here. Below the loop there are only
these frozen values.
"""

import dataclasses
import pathlib
from typing import Mapping, NamedTuple

import ml_collections

from gemma_qat import distances
from gemma_qat import errors
from gemma_qat.model import attention
from gemma_qat.model import config as model_config
from gemma_qat.model import transformer
from gemma_qat.quant import formats
from gemma_qat.quant import lattice
from gemma_qat.training import machine
from gemma_qat.training import moments

Rules = tuple[tuple[str, str | None], ...]
# Of codes; anything else is a model to take them from.
STARTS = ('reference', 'search', 'gptq')


@dataclasses.dataclass(frozen=True)
class QuantSettings:
  """Which weights take which format, how, and where they start.

  Attributes:
    rules: ordered (regex, format name); None leaves a weight as it is.
    modes: ordered (regex, mode of `quant.lattice`) for the quantized ones.
    start: 'reference' (the format's own rounding), 'search' (block by block,
      importance-weighted least squares), 'gptq' (rounding coordinated over
      a row), or a model whose codes, scales and gains are taken.
    calibration_tokens: how many training tokens the teacher reads for the
      activation statistics of 'search', 'gptq' and `fold`.
    fold: whether channels are scaled by their activations first, where norms
      and neighbouring matrices take the inverse (see `quant.folding`).
    error_propagation: of 'gptq' alone: how much of what the layers before a
      matrix lost it makes up for before its own rounding, 0 .. 1; layers are
      then rounded in order, for what the student's layers before them write
      (see `propagation`). 0: each for what the teacher's write.
    straight_through: 'plain' lets the gradient through to every master,
      'clipped' not where the code is at its limit; 'auto' is plain in the mode
      'derived' and clipped in 'learned'.
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
  fold: bool
  error_propagation: float
  straight_through: str
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
    average: decay of a running mean of what is trained, which the last step
      puts in its place; 0 for none.
    dampening: how strongly masters are drawn to the value that they round to,
      in units of a gradient per weight; 0 not at all.
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
  average: float
  dampening: float


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
    freeze_codes: share of the last steps in which codes stand still and only
      the rest of what is trained goes on; 0 for none.
    checkpoint_every, evaluate_every, log_every: in steps.
    keep, keep_best, keep_every: checkpoints kept: the newest so many, so many
      of the smallest held-out KL, and that of every n-th step; 0 for none of
      the latter two.
    most_skipped: steps in a row without finite numbers that end the run.
    stall_seconds: how long the text may take for a batch before it is said.
    heldout_batches: batches of held-out text that `evaluate_every` scores.
  """

  steps: int
  batch_size: int
  accumulate: int
  length: int
  rules: Rules
  freeze_codes: float
  checkpoint_every: int
  evaluate_every: int
  log_every: int
  keep: int
  keep_best: int
  keep_every: int
  heldout_batches: int
  most_skipped: int
  stall_seconds: float


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
  loss: distances.Options
  train: TrainSettings
  optimizer: OptimizerSettings
  compute: ComputeSettings
  mesh: MeshSettings


def sizes(
    config: ml_collections.ConfigDict, model: model_config.ModelConfig
) -> model_config.ModelConfig:
  """The checkpoint's sizes, laid out in the tree as the config wants."""
  return dataclasses.replace(model, is_scanned=config.model.scan_layers)


def read(config: ml_collections.ConfigDict) -> Settings:
  """Checks and freezes all of a config that the loop needs."""
  s = Settings(
      quant(config), loss(config), train(config), optimizer(config),
      compute(config), mesh(config),
  )
  if s.optimizer.dampening or s.train.freeze_codes:
    field = 'optimizer.dampening' if s.optimizer.dampening else (
        'train.freeze_codes'
    )
    if not any(
        mode == 'derived' or lattice.is_learned(mode)
        for _, mode in s.quant.modes
    ):
      raise errors.UserError(
          f'config.{field} is about codes that move, but no mode of '
          'config.quant.modes lets them: set it to 0, or train some weights '
          "with 'learned' or 'derived'."
      )
  return s


def loss(config: ml_collections.ConfigDict) -> distances.Options:
  """Checks and freezes `config.loss`."""
  values = config.loss.to_dict()
  s = distances.Options(**(values | {'terms': _rules(config.loss.terms)}))
  names = [name for name, _ in s.terms]
  for name, weight in s.terms:
    _choice('config.loss.terms', name, distances.NAMES)
    if not weight > 0:
      raise errors.UserError(
          f'config.loss.terms gives {name} the weight {weight}: leave it out, '
          'or give it one above 0.'
      )
  if not names or len(set(names)) < len(names):
    raise errors.UserError(
        f'config.loss.terms={s.terms}: name every term once, and one at least.'
    )
  if names == ['hidden']:
    raise errors.UserError(
        "config.loss.terms has 'hidden' alone, which says nothing of the "
        'probabilities that are wanted: add another term.'
    )
  if not s.temperature > 0 or s.top_k < 1:
    raise errors.UserError(
        f'config.loss.temperature={s.temperature} and top_k={s.top_k}: the '
        'first must be above 0, the second 1 or more.'
    )
  return s


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
      fold=config.quant.fold,
      error_propagation=config.quant.error_propagation,
      straight_through=config.quant.straight_through,
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
  if s.start not in STARTS and not pathlib.Path(s.start).exists():
    raise errors.UserError(
        f'config.quant.start: {s.start!r} is not one of {", ".join(STARTS)}, '
        'nor a model that exists.'
    )
  if s.start not in STARTS and s.fold:
    raise errors.UserError(
        f'config.quant.fold scales channels before codes are found, but '
        f'config.quant.start={s.start} has found them: set it to False.'
    )
  if s.calibration_tokens < 1:
    raise errors.UserError(
        f'config.quant.calibration_tokens={s.calibration_tokens} is below 1.'
    )
  if not 0 <= s.error_propagation <= 1:
    raise errors.UserError(
        f'config.quant.error_propagation={s.error_propagation} is no share: '
        'take one in 0 .. 1.'
    )
  _choice('config.quant.straight_through', s.straight_through,
          ('auto', *lattice.STRAIGHT_THROUGH))
  for _, mode in s.modes:
    try:
      lattice.check_mode(mode)
    except errors.UserError as error:
      raise errors.UserError(f'config.quant.modes: {error}') from error
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
  if not 0 <= s.average < 1 or s.dampening < 0:
    raise errors.UserError(
        f'config.optimizer.average={s.average} and dampening={s.dampening}: '
        'the first must be in 0 .. 1 (1 not included), the second not below 0.'
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
    least = 0 if field.name in ('keep_best', 'keep_every') else 1
    if field.type is int and value < least:
      raise errors.UserError(
          f'config.train.{field.name}={value} is below {least}.'
      )
  if not s.stall_seconds > 0:
    raise errors.UserError(
        f'config.train.stall_seconds={s.stall_seconds} is not above 0.'
    )
  if not 0 <= s.freeze_codes < 1:
    raise errors.UserError(
        f'config.train.freeze_codes={s.freeze_codes} is no share of the steps: '
        'take one in 0 .. 1 (1 not included).'
    )
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
    s = dataclasses.replace(s, dtype=machine.fast_dtype())
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


def _choice(field, value, allowed):
  if value not in allowed:
    raise errors.UserError(
        f'{field}: {value!r} is not one of {", ".join(allowed)}.'
    )


def _rules(rules) -> Rules:
  return tuple((pattern, value) for pattern, value in rules)
