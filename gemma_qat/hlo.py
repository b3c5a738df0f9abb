"""What does the text of a compiled program say, instruction by instruction?

Reads what `jax.stages.Compiled.as_text()` returns: optimized HLO of one device,
computation after computation, an instruction a line.
"""

import dataclasses
import functools
import math
import re
from typing import Mapping

# Bits of an element; what is not listed (tokens, opaque) takes none.
_BITS = {
    'pred': 8, 'bf16': 16, 'c64': 64, 'c128': 128,
    **{f'{kind}{n}': n for kind in 'su' for n in (2, 4, 8, 16, 32, 64)},
    **{f'f{n}': n for n in (16, 32, 64)},
}
_ARRAY = re.compile(r'([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?')
# '%x#3' is the fourth element of the tuple x.
_NAME = re.compile(r'%([\w.\-]+(?:#\d+)?)')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{')
_CALLED = re.compile(
    r'(calls|to_apply|body|condition|branch_computations|true_computation|'
    r'false_computation|called_computations)=(\{[^}]*\}|%?[\w.\-]+)'
)


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape: element type, sizes, and the memory it lies in.

  space 0 is the device's main memory, others (TPU: 1, its VMEM) are on chip.
  """

  dtype: str
  sizes: tuple[int, ...]
  space: int = 0

  @property
  def num_bytes(self) -> int:
    bits = _BITS.get(self.dtype, 8 if self.dtype.startswith('f8') else 0)
    return math.ceil(math.prod(self.sizes) * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `%name = shape opcode(operands), rest`."""

  name: str
  shape: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  inside: str
  rest: str
  is_root: bool

  @functools.cached_property
  def called(self) -> tuple[tuple[str, str], ...]:
    """(attribute, computation) of every computation that it names."""
    return tuple(
        (key, name)
        for key, value in _CALLED.findall(self.rest)
        for name in re.findall(r'[\w.\-]+', value)
    )


@dataclasses.dataclass(frozen=True)
class Program:
  """Computations by name, each a dict of instructions in order.

  num_devices: over how many devices the whole program runs.
  """

  computations: Mapping[str, Mapping[str, Instruction]]
  entry: str
  num_devices: int

  def operands(self, where: str, line: Instruction) -> list[Instruction]:
    """Returns the instructions that make the operands of one."""
    body = self.computations[where]
    return [body[name] for name in line.operands if name in body]


def parse(text: str) -> Program:
  """Reads a module's text."""
  computations, entry, body = {}, '', None
  counts = re.findall(
      r'(?:num_partitions|replica_count)=(\d+)', text.partition('\n')[0]
  )
  for line in text.splitlines():
    if line.startswith('  ') and body is not None:
      found = _instruction(line.strip())
      if found is not None:
        body |= _elements(body, found)
        body[found.name] = found
    elif head := _HEAD.match(line):
      body = computations.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
    elif line.startswith('}'):
      body = None
  return Program(computations, entry, math.prod(map(int, counts)))


def fused(program: Program, line: Instruction) -> str | None:
  """Returns the computation inside a fusion or an asynchronous start."""
  if line.opcode in ('fusion', 'async-start'):
    return dict(line.called).get('calls')
  return None


def root(body: Mapping[str, Instruction]) -> Instruction:
  """Returns the instruction whose result is the computation's."""
  return next(x for x in body.values() if x.is_root)


def through(
    body: Mapping[str, Instruction], line: Instruction | None
) -> Instruction | None:
  """Goes back through what changes no value."""
  while line is not None and line.opcode in ('copy', 'bitcast', 'convert'):
    line = body.get(line.operands[0])
  return line


def _instruction(text):
  is_root = text.startswith('ROOT ')
  name, equals, rest = text.removeprefix('ROOT ').partition(' = ')
  if not equals:
    return None
  end = _closing(rest, 0) if rest.startswith('(') else rest.index(' ') - 1
  shape, rest = rest[: end + 1], rest[end + 1 :].strip()
  opcode, _, _ = rest.partition('(')
  close = _closing(rest, len(opcode))
  inside = rest[len(opcode) + 1 : close]
  return Instruction(
      name.lstrip('%'), _arrays(shape), opcode, tuple(_NAME.findall(inside)),
      inside, rest[close + 1 :], is_root,
  )


def _elements(body, line):
  """The instructions that take those elements of tuples that a line reads."""
  found = {}
  for operand in line.operands:
    name, mark, index = operand.partition('#')
    if mark and name in body:
      found[operand] = Instruction(
          operand, body[name].shape[int(index) :][:1], 'get-tuple-element',
          (name,), f'%{name}', f', index={index}', False,
      )
  return found


def _arrays(shape):
  found = []
  for dtype, sizes, layout in _ARRAY.findall(shape):
    space = re.search(r'S\((\d+)\)', layout)
    sizes = tuple(int(n.lstrip('<=')) for n in sizes.split(',') if n)
    found.append(Array(dtype, sizes, int(space[1]) if space else 0))
  return tuple(found)


def _closing(text, start):
  """Index of the bracket that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if not depth:
      return i
  return len(text) - 1
