"""What was a process doing when it died?

A small file in memory that the fuzzing process maps and writes, and the one
above it reads: it is there whatever becomes of the first.
"""

import mmap
import os
import pathlib
import resource
import struct
import time
from typing import NamedTuple

from experiments.fuzz import inputs

_FIELDS = struct.Struct('<QQQQdddd')
_SIZE = _FIELDS.size + 8 + inputs.LONGEST + 64


def peak_bytes() -> int:
  """The most memory that this process ever had."""
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Said(NamedTuple):
  """What a process has done.

  inputs: begun. read, refused: of those that are done. findings: distinct.
  began: when the current input began (monotonic seconds), 0 while there is
  none. slowest: seconds of an input. taken: the most bytes that an input took.
  peak: the most bytes that the process had.
  """

  inputs: int = 0
  read: int = 0
  refused: int = 0
  findings: int = 0
  began: float = 0.0
  slowest: float = 0.0
  taken: float = 0.0
  peak: float = 0.0


class State:
  """The mapped file. One writes, another reads."""

  def __init__(self, path: pathlib.Path):
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(descriptor, _SIZE)
    self._map = mmap.mmap(descriptor, _SIZE)
    os.close(descriptor)
    self.said = Said(*_FIELDS.unpack_from(self._map))

  def begin(self, data: bytes) -> None:
    """Remembers an input before it is read."""
    start = _FIELDS.size + 8
    self._map[start : start + len(data)] = data
    struct.pack_into('<Q', self._map, _FIELDS.size, len(data))
    self._say(self.said._replace(
        inputs=self.said.inputs + 1, began=time.monotonic()
    ))

  def end(self, outcome: str, taken: int, findings: int) -> float:
    """Counts an input; returns the seconds that it took."""
    seconds = time.monotonic() - self.said.began
    said = self.said
    self._say(Said(
        said.inputs, said.read + (outcome == 'read'),
        said.refused + (outcome == 'refused'), findings, 0.0,
        max(said.slowest, seconds), max(said.taken, taken), peak_bytes(),
    ))
    return seconds

  def look(self) -> Said:
    """What stands there now, by whomever."""
    return Said(*_FIELDS.unpack_from(self._map))

  def last(self) -> bytes:
    """The input that was begun last."""
    size, = struct.unpack_from('<Q', self._map, _FIELDS.size)
    return self._map[_FIELDS.size + 8 :][:size]

  def _say(self, said):
    self.said = said
    _FIELDS.pack_into(self._map, 0, *said)
