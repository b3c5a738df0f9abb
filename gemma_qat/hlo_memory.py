"""How many bytes does an instruction of a compiled program read and write?"""

from gemma_qat import hlo

# They only name what is there, or are counted where they lead.
_FREE = (
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while',
    'call', 'conditional', 'after-all', 'partition-id', 'replica-id', 'iota',
    'opt-barrier', 'optimization-barrier', 'async-start',
)

# What holds the same elements in another form.
_SAME = ('bitcast', 'convert', 'reshape', 'copy')


def only_slices(program: hlo.Program, where: str, name: str) -> bool:
  """Whether an array is read, and by nothing but dynamic slices."""
  body = program.computations[where]
  users = [
      (line, i) for line in body.values()
      for i, operand in enumerate(line.operands) if operand == name
  ]
  def is_slice(line, i):
    if line.opcode in _SAME:
      return only_slices(program, where, line.name)
    if (inner := hlo.fused(program, line)) is not None:
      parameter = _parameter(program, inner, i)
      return parameter and only_slices(program, inner, parameter.name)
    return line.opcode == 'dynamic-slice' and i == 0
  return bool(users) and not body[name].is_root and all(
      is_slice(*user) for user in users
  )


def memory_bytes(
    program: hlo.Program, where: str, line: hlo.Instruction
) -> float:
  """Bytes that an instruction reads from and writes to main memory.

  Slices and gathers read what they take, an update in place writes what is
  new; a loop or a call is counted in its own computations.
  """
  if line.opcode in _FREE or line.opcode.endswith(('-done', '-update')):
    return 0
  if line.opcode == 'copy-start':
    return sum(a.num_bytes for a in line.shape[:2] if not a.space)
  read = 0
  for i, operand in enumerate(program.operands(where, line)):
    if all(a.space for a in operand.shape):
      continue
    part = _part_read(program, line, i)
    read += _size(operand) if part is None else part
  written = sum(a.num_bytes for a in line.shape if not a.space)
  if (update := _in_place(program, where, line)) is not None:
    written = update
  return read + written


def _size(line):
  return sum(a.num_bytes for a in line.shape if not a.space)


def _read_bytes(program, where, name):
  """Bytes that slices read of an array; None if someone reads all of it."""
  total = 0
  for line in program.computations[where].values():
    for i, operand in enumerate(line.operands):
      if operand != name:
        continue
      if line.is_root and line.opcode in _SAME:
        return None
      if line.opcode in _SAME:
        part = _read_bytes(program, where, line.name)
      else:
        part = _part_read(program, line, i)
      if part is None:
        return None
      total += part
  return total


def _part_read(program, line, i):
  """Bytes that a line reads of its operand i; None for all of it."""
  if line.opcode in ('dynamic-slice', 'slice', 'gather') and i == 0:
    return sum(a.num_bytes for a in line.shape)
  if line.opcode == 'dynamic-update-slice' and i == 0:
    return 0
  inner = hlo.fused(program, line)
  if inner is None:
    return None
  parameter = _parameter(program, inner, i)
  if parameter is None or parameter.is_root:
    return None
  return _read_bytes(program, inner, parameter.name)


def _parameter(program, inner, i):
  """What operand i of a fusion is called inside."""
  return next(
      (x for x in program.computations[inner].values()
       if x.opcode == 'parameter' and int(x.inside) == i), None
  )


def _in_place(program, where, line):
  """Bytes that an update in place writes, None for any other line."""
  inner = hlo.fused(program, line)
  body = program.computations[inner or where]
  last = hlo.through(body, hlo.root(body)) if inner else line
  lines = [last]
  if last.opcode == 'tuple':
    lines = [hlo.through(body, body[n]) for n in last.operands]
  if not any(x.opcode == 'dynamic-update-slice' for x in lines):
    return None
  return sum(
      _size(body[x.operands[1]]) if x.opcode == 'dynamic-update-slice'
      else _size(x) for x in lines
  )
