"""What would a run take on machines that nobody has at hand yet?

The step that would run is compiled ahead of time for a description of devices;
its arguments are only described. What the compiler then says is exact or its
own estimate; what follows from published figures of the device is called so.
"""

import dataclasses
import pathlib
import re
import tempfile
import time
from typing import Any, Mapping

import jax
import ml_collections
import numpy as np

from gemma_qat import compiled
from gemma_qat import sharding
from gemma_qat.model import config as model_config
from gemma_qat.model import flops
from gemma_qat.training import job
from gemma_qat.training import settings
from gemma_qat.training import student as student_lib
from gemma_qat.training import topologies

# What 'auto' means where the machine cannot be asked. A GPU would take 'cudnn',
# for which nothing compiles here.
_DTYPE, _ATTENTION = 'bfloat16', 'blockwise'
_PARTITIONED = '*.after_spmd-partitioning.*.txt'


@dataclasses.dataclass(frozen=True)
class Forecast:
  """What a step needs, moves and takes. Bytes and FLOPs are of one device.

  Attributes:
    size, topology, compiler: what was compiled, for what, by what.
    mesh: {axis: size}; gather: what of the student travels under fsdp.
    batch, length, steps: of the run.
    trained: groups of trained leaves.
    moments: how the optimizer keeps its statistics.
    parts: bytes of the arguments: 'weights' (of the student, in whatever form),
      'optimizer', 'teacher', 'batch'.
    memory: what the compiler says; None if the program does not fit.
    refusal: the compiler's words where it does not fit, else ''.
    contents: what one step does; None if it does not fit.
    model_flops: that a step asks for, of all devices together.
    seconds: that the compilation took.
  """

  size: str
  topology: topologies.Topology
  compiler: str
  mesh: Mapping[str, int]
  gather: str
  batch: int
  length: int
  steps: int
  trained: str
  moments: str
  parts: Mapping[str, int]
  memory: compiled.Memory | None
  refusal: str
  contents: compiled.Contents | None
  model_flops: float
  seconds: float

  @property
  def needed(self) -> int | None:
    """Bytes that a device must have; None if the compiler gave up.

    What a compiler for CPUs says of code is not a GPU's.
    """
    if self.memory is None:
      return _needed(self.refusal)
    code = 0 if self.topology.is_tpu else self.memory.code
    return self.memory.total - code

  @property
  def spare(self) -> int | None:
    """Bytes that are left over on a device, negative if it does not fit."""
    if self.needed is None:
      return None
    return self.topology.device.memory_bytes - self.needed

  @property
  def product_seconds(self) -> float | None:
    """The step's products at the device's peak."""
    if self.contents is None or self.topology.device.flops is None:
      return None
    return self.contents.flops / self.topology.device.flops

  @property
  def memory_seconds(self) -> float | None:
    """The step's traffic with main memory at the published bandwidth.

    Only for TPUs: what a CPU's compiler fuses says nothing of a GPU.
    """
    if self.contents is None or not self.topology.is_tpu:
      return None
    return self.contents.memory_bytes / self.topology.device.memory_bandwidth

  @property
  def link_seconds(self) -> float | None:
    """What a device sends, over all its links at their published bandwidth."""
    if self.contents is None:
      return None
    return self.contents.sent_bytes / self.topology.device.link_bandwidth

  @property
  def cycle_seconds(self) -> float | None:
    """The compiler's estimate of all but the collectives."""
    clock = self.topology.device.clock
    if self.contents is None or None in (clock, self.contents.cycles):
      return None
    return self.contents.cycles / clock

  @property
  def best_seconds(self) -> float | None:
    """A bound: products, memory and links all at once, each at its peak."""
    if self.product_seconds is None:
      return None
    return max(
        self.product_seconds, self.memory_seconds or 0, self.link_seconds
    )

  @property
  def estimated_seconds(self) -> float | None:
    """The compiler's estimate, and the links one after the other with it."""
    if self.cycle_seconds is None:
      return None
    return self.cycle_seconds + self.link_seconds

  def utilisation(self, seconds: float | None) -> float | None:
    """Model FLOPs utilisation of a step that takes so long."""
    peak = self.topology.device.flops
    if None in (seconds, peak):
      return None
    return self.model_flops / (seconds * peak * self.topology.count)

  def hours(self, seconds: float | None) -> float | None:
    return None if seconds is None else seconds * self.steps / 3600


def make(
    config: ml_collections.ConfigDict,
    model: model_config.ModelConfig,
    topology: topologies.Topology,
) -> Forecast:
  """Compiles the step of a run for devices that need not be there.

  Takes minutes: as long as it will take on the machines themselves.

  Args:
    config: of the run; its mesh is laid over the topology.
    model: the sizes; `config.model.checkpoint` is not read.
    topology: from `topologies.parse`.

  Raises:
    UserError: the mesh fits neither the devices nor the model, or the devices
      cannot be described here.
  """
  found = topologies.describe(topology)
  s = settings.read(for_target(config))
  mesh = sharding.make_mesh(s.mesh.data, s.mesh.fsdp, s.mesh.tensor, found)
  sharding.check(
      mesh, 'config.train.batch_size', (s.train.batch_size,), ('batch',)
  )
  model = settings.sizes(config, model)
  program, arguments = job.abstract(s, mesh, model)
  state, settled, teacher, batch = arguments
  parts = {
      'weights': device_bytes(
          (state.step, state.skipped, state.trained, settled)
      ),
      'optimizer': device_bytes(state.optimizer),
      'teacher': device_bytes(teacher),
      'batch': device_bytes(batch),
  }
  plan = student_lib.make_plan(model, s.quant)
  groups = student_lib.groups(student_lib.outline(model, plan), s.train.rules)
  start = time.monotonic()
  memory, contents, refusal = _compile(program.step, arguments, topology)
  return Forecast(
      size=model.variant,
      topology=topology,
      compiler=topologies.compiler(topology),
      mesh=dict(mesh.shape),
      gather=s.mesh.gather,
      batch=s.train.batch_size,
      length=s.train.length,
      steps=s.train.steps,
      trained=', '.join(sorted(set(groups.values()))),
      moments=f'{s.optimizer.name}, {s.optimizer.moments}',
      parts=parts,
      memory=memory,
      refusal=refusal,
      contents=contents,
      model_flops=flops.train_step(
          model, s.train.batch_size, s.train.length,
          train_head=any(p.split('/')[0] == 'embedding' for p in groups),
      ),
      seconds=time.monotonic() - start,
  )


def for_target(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Resolves 'auto' for an accelerator, not for the machine that plans."""
  config = config.copy_and_resolve_references().unlock()
  if config.compute.dtype == 'auto':
    config.compute.dtype = _DTYPE
  if config.compute.attention == 'auto':
    config.compute.attention = _ATTENTION
  return config.lock()


def device_bytes(tree: Any) -> int:
  """Bytes that one device holds of described arrays."""
  return sum(
      int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
  )


def _compile(step, arguments, topology):
  """Returns (memory, contents, refusal); only the refusal if it is too big."""
  lowered = step.lower(*arguments)
  if not topology.is_tpu:
    return *_partitioned(lowered), ''
  try:
    program = compiled.compile_to_ask(lowered, {})
  except jax.errors.JaxRuntimeError as error:
    text = ' '.join(str(error).split())
    if 'RESOURCE_EXHAUSTED' not in text:
      raise
    return None, None, text[:400]
  return compiled.memory(program), compiled.read(program.as_text()), ''


def _partitioned(lowered):
  """Compiles for simulated devices; reads the program as it was parted.

  Before the CPU's own passes, which compute bfloat16 in float32: what they
  move would be twice as much. Nor may these conversions leave the loops: of
  12B, whole stacks of weights in float32 took 50 GB that no GPU would need.
  """
  with tempfile.TemporaryDirectory() as folder:
    program = compiled.compile_to_ask(lowered, {
        **compiled.NO_LIBRARIES,
        'xla_dump_to': folder,
        'xla_dump_hlo_pass_re': 'spmd-partitioning',
        'xla_dump_hlo_as_text': True,
        'xla_disable_hlo_passes': 'while-loop-invariant-code-motion',
        # Nobody will run it.
        'xla_backend_optimization_level': 0,
        'xla_llvm_disable_expensive_passes': True,
    })
    # There is none for a single device; small programs (of constants) may
    # have theirs.
    texts = [
        path.read_text(encoding='utf-8')
        for path in pathlib.Path(folder).glob(_PARTITIONED)
    ]
  text = max(texts, key=len, default=None) or program.as_text()
  return compiled.memory(program), compiled.read(text, scattering=True)


def _needed(refusal):
  """Reads the bytes that a compiler says it would need, the largest it names.
  """
  units = {'M': 2**20, 'G': 2**30, 'T': 2**40}
  found = re.findall(r'\b(\d+(?:\.\d+)?)([MGT])\b', refusal)
  return max((round(float(n) * units[u]) for n, u in found), default=None)
