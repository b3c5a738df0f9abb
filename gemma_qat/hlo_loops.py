"""How often does each part of a compiled program run?"""

import re

from gemma_qat import hlo


def calls(program: hlo.Program) -> tuple[dict[str, float], tuple[str, ...]]:
  """Says how often every computation runs in one run of the program.

  Computations inside a fusion, and those of reductions, are not followed: they
  are part of the instruction that calls them. Every branch of a conditional
  counts as taken.

  Returns:
    ({computation: times}, names of the while loops whose number of rounds does
    not stand in the text; their bodies are counted once).
  """
  times, unknown = {}, []

  def visit(name, factor):
    times[name] = times.get(name, 0) + factor
    for line in program.computations[name].values():
      if line.opcode == 'while':
        rounds = trip_count(program, name, line)
        if rounds is None:
          unknown.append(line.name)
        parts = dict(line.called)
        visit(parts['body'], factor * (1 if rounds is None else rounds))
      elif line.opcode in ('call', 'conditional'):
        for _, called in line.called:
          visit(called, factor)

  visit(program.entry, 1)
  return times, tuple(unknown)


def trip_count(
    program: hlo.Program, where: str, loop: hlo.Instruction
) -> int | None:
  """How many rounds a while loop makes, if the text says so.

  Some compilers write it down; in others' text the condition compares a
  counter with a constant, and the body adds 1 to it.
  """
  if known := re.search(r'known_trip_count[":{n\s]*"?(\d+)', loop.rest):
    return int(known[1])
  parts = dict(loop.called)
  body = program.computations[parts['body']]
  condition = program.computations[parts['condition']]
  compare = hlo.through(condition, hlo.root(condition))
  if compare.opcode == 'fusion':
    inner = program.computations[dict(compare.called)['calls']]
    operands, compare = compare.operands, hlo.root(inner)
    inputs = [
        condition[operands[int(x.inside)]]
        if (x := hlo.through(inner, inner[n])).opcode == 'parameter' else x
        for n in compare.operands
    ]
  else:
    inputs = [condition[n] for n in compare.operands]
  if compare.opcode != 'compare' or 'direction=LT' not in compare.rest:
    return None
  counter = _index(hlo.through(condition, inputs[0]))
  start = _input(program, where, loop, counter)
  limit = hlo.through(condition, inputs[1])
  if (index := _index(limit)) is not None:
    limit = _input(program, where, loop, index)
  if not _adds_one(program, body, counter):
    return None
  values = [_constant(x) for x in (start, limit)]
  return None if None in values else max(values[1] - values[0], 0)


def _index(line):
  """Index of the loop's variable that an instruction reads, or None."""
  if line is None or line.opcode != 'get-tuple-element':
    return None
  return int(re.search(r'index=(\d+)', line.rest)[1])


def _input(program, where, loop, index):
  """What a loop's variable is before the first round."""
  if index is None:
    return None
  body = program.computations[where]
  start = body.get(loop.operands[0])
  if start is None or start.opcode != 'tuple':
    return None
  return hlo.through(body, body.get(start.operands[index]))


def _adds_one(program, body, counter):
  if counter is None:
    return False
  last = hlo.root(body)
  line = hlo.through(body, body.get(last.operands[counter]))
  if line is not None and line.opcode == 'fusion':
    inner = program.computations[dict(line.called)['calls']]
    line = hlo.through(inner, hlo.root(inner))
    body = inner
  if line is None or line.opcode != 'add':
    return False
  return 1 in [_constant(hlo.through(body, body.get(n))) for n in line.operands]


def _constant(line):
  if line is None or line.opcode != 'constant':
    return None
  return int(line.inside) if re.fullmatch(r'-?\d+', line.inside) else None
