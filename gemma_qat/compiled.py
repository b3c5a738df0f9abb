"""What does a compiled program move between devices, compute and hold?

Everything is per device and counts a loop's body as often as it runs, which
`cost_analysis()` of a compiled program does not: it counts it once.
"""

from collections.abc import Iterator
import dataclasses
import math
import re
from typing import Any, Mapping

import jax
from jax.experimental.compilation_cache import compilation_cache

from gemma_qat import hlo
from gemma_qat import hlo_loops
from gemma_qat import hlo_memory

KINDS = (
    'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all',
    'collective-permute', 'collective-broadcast', 'ragged-all-to-all',
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction in which devices exchange arrays.

  Attributes:
    kind: one of KINDS.
    dtype: of its first operand.
    whole_bytes: what goes round: the gathered result of an all-gather, the
      operands of all others.
    sent_bytes: what one device sends if the algorithm is a ring over groups of
      g devices: (g - 1) / g of whole_bytes, twice that in an all-reduce (which
      is a reduce-scatter and an all-gather), once whole_bytes in a permutation
      or broadcast.
    group_size: devices that exchange with one another.
    times: how often it runs in one run of the program.
    source: the operation of the model that it comes from, if that is known.
  """

  kind: str
  dtype: str
  whole_bytes: int
  sent_bytes: float
  group_size: int
  times: float
  source: str


@dataclasses.dataclass(frozen=True)
class Contents:
  """What one run of a program does on one device.

  Attributes:
    collectives: in the order of the text.
    flops: of matrix products and convolutions; a multiplication and an
      addition are two. Nothing elementwise.
    memory_bytes: read from and written to the device's main memory, if every
      instruction (a fusion is one) reads its operands and writes its result
      there, and slices read only what they take. Not what lies on chip.
    cycles: sum of the compiler's own estimates, None where it makes none. It
      makes none of collectives.
    unknown_loops: loops whose rounds the text does not say; counted once.
    uncounted: instructions that hide products, in a library's hands.
  """

  collectives: tuple[Collective, ...]
  flops: float
  memory_bytes: float
  cycles: float | None
  unknown_loops: tuple[str, ...]
  uncounted: tuple[str, ...]

  @property
  def sent_bytes(self) -> float:
    return sum(c.times * c.sent_bytes for c in self.collectives)

  def by_kind(self) -> dict[str, tuple[float, float, float]]:
    """Sums up: {kind: (runs, whole bytes, sent bytes)} in one run."""
    found = {}
    for c in self.collectives:
      runs, whole, sent = found.get(c.kind, (0, 0, 0))
      found[c.kind] = (
          runs + c.times, whole + c.times * c.whole_bytes,
          sent + c.times * c.sent_bytes,
      )
    return found


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device while a program runs.

  An output that takes the place of a donated argument is counted in both and
  in `aliased`.
  """

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int

  @property
  def total(self) -> int:
    return (
        self.arguments + self.outputs - self.aliased + self.temporaries
        + self.code
    )


# Products fused for YNNPACK allocate inside of it: a program of one such fusion
# says that it needs no temporaries, and has no products to count either.
NO_LIBRARIES = {'xla_cpu_experimental_ynn_fusion_type': ''}


def compile_to_ask(
    lowered: jax.stages.Lowered, options: Mapping[str, Any] = NO_LIBRARIES
) -> jax.stages.Compiled:
  """Compiles a program that is asked what it holds and does, not run.

  Without JAX's persistent cache: a program loaded from there says that it needs
  no memory for temporaries, and compiling it writes no dumps.

  Args:
    lowered: what `jit(f).lower(...)` returns.
    options: of the compiler; those of a CPU's by default.
  """
  name = 'jax_enable_compilation_cache'
  before = getattr(jax.config, name)

  def switch(to):
    jax.config.update(name, to)
    # JAX looks at the switch once, before the first compilation.
    compilation_cache.reset_cache()

  switch(False)
  try:
    return lowered.compile(dict(options))
  finally:
    switch(before)


def memory(compiled: jax.stages.Compiled) -> Memory:
  """Asks a program of `compile_to_ask` what it needs of every device."""
  found = compiled.memory_analysis()
  return Memory(
      arguments=found.argument_size_in_bytes,
      outputs=found.output_size_in_bytes,
      aliased=found.alias_size_in_bytes,
      temporaries=found.temp_size_in_bytes,
      code=found.generated_code_size_in_bytes,
  )


def read(text: str, scattering: bool = False) -> Contents:
  """Reads what `compiled.as_text()` says.

  Args:
    text: optimized HLO.
    scattering: take an all-reduce of which a device only reads its slice for a
      reduce-scatter, as TPU and GPU compilers make one of it; a CPU's does not.
  """
  program = hlo.parse(text)
  times, unknown = hlo_loops.calls(program)
  collectives, uncounted = [], []
  flops, moved, cycles = 0, 0, None
  for name, factor in times.items():
    for line in program.computations[name].values():
      moved += factor * hlo_memory.memory_bytes(program, name, line)
      if estimate := re.search(r'"estimated_cycles":"(\d+)"', line.rest):
        cycles = (cycles or 0) + factor * int(estimate[1])
    for where, line in _inside(program, name):
      if line.opcode.removesuffix('-start') in KINDS:
        is_slice = scattering or where != name
        collectives.append(
            _collective(program, where, line, factor, is_slice)
        )
      elif line.opcode in ('dot', 'convolution'):
        flops += factor * product_flops(program, where, line)
      elif line.opcode == 'custom-call' and re.search(
          'gemm|matmul|conv', line.rest.split(', metadata')[0].lower()
      ):
        uncounted.append(line.name)
  return Contents(
      tuple(collectives), flops, moved, cycles, unknown, tuple(uncounted)
  )


def product_flops(
    program: hlo.Program, where: str, line: hlo.Instruction
) -> float:
  """Counts a matrix product, or the convolution that stands for one."""
  left, right = (x.shape[0].sizes for x in program.operands(where, line))
  out = line.shape[0].sizes
  if line.opcode == 'dot':
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', line.rest)[1]
    length = math.prod(left[int(i)] for i in contracted.split(',') if i)
    return 2 * math.prod(out) * length
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', line.rest)
  lhs, rhs, to = labels.groups()
  count = out[to.index('b')] * out[to.index('f')] * right[rhs.index('i')]
  for axis in sorted(set(to) - set('bf')):
    count *= _window_hits(
        line.rest, int(axis), left[lhs.index(axis)], right[rhs.index(axis)],
        out[to.index(axis)],
    )
  return 2 * count


def _window_hits(rest, axis, size, kernel, out):
  """How many pairs of (output, place in the kernel) meet an element.

  A batched product is written as a convolution whose kernel is as long as the
  batch and meets one element of it at a time: padding and the holes of a
  dilated operand cost nothing.
  """
  window = re.search(r'window=\{([^}]*)\}', rest)
  fields = dict(
      pair.split('=') for pair in (window[1].split() if window else ())
  )
  field = lambda name, default: (
      fields[name].split('x')[axis] if name in fields else default
  )
  low = int(field('pad', '0_0').split('_')[0])
  stride, spread = int(field('stride', 1)), int(field('lhs_dilate', 1))
  step = int(field('rhs_dilate', 1))
  last = (size - 1) * spread
  hits = 0
  for k in range(kernel):
    # Positions o * stride + k * step - low that are multiples of `spread`.
    first = k * step - low
    for o in range(out):
      place = o * stride + first
      hits += 0 <= place <= last and place % spread == 0
  return hits


def _inside(
    program: hlo.Program, name: str
) -> Iterator[tuple[str, hlo.Instruction]]:
  """Every instruction of a computation and of the fusions in it."""
  for line in program.computations[name].values():
    inner = hlo.fused(program, line)
    if inner is not None:
      yield from _inside(program, inner)
    yield name, line


def _collective(program, where, line, times, is_slice):
  kind = line.opcode.removesuffix('-start')
  operands = program.operands(where, line)
  arrays = [a for x in operands for a in x.shape]
  held = sum(a.num_bytes for a in arrays)
  group = _group_size(program, line.rest)
  if kind == 'all-reduce' and is_slice and hlo_memory.only_slices(
      program, where, line.name
  ):
    kind = 'reduce-scatter'
  whole = held * group if kind == 'all-gather' else held
  sent = whole * (group - 1) / group
  if kind == 'all-reduce':
    sent *= 2
  elif kind in ('collective-permute', 'collective-broadcast'):
    sent = whole
  source = re.search(r'op_name="([^"]*)"', line.rest)
  return Collective(
      kind, arrays[0].dtype, whole, sent, group, times,
      source[1] if source else '',
  )


def _group_size(program, rest):
  """Reads how many devices are in a group, in any of its four spellings."""
  groups = re.search(r'replica_groups=(.*)', rest)
  text = groups[1] if groups else ''
  if found := re.match(r'\{\{([\d,]+)\}', text):
    return found[1].count(',') + 1
  if found := re.match(r'\[\d+,(\d+)\]', text):
    return int(found[1])
  if found := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\([^)]*\)*)?\s*"
                       r'\{([^}]*)\}', text):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  return program.num_devices
