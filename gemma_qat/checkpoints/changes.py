"""By how much do a written file's weights differ from those it was given?"""

import dataclasses
import math

import numpy as np

KINDS = ('matrices', 'embedding', 'norms')


@dataclasses.dataclass
class Change:
  """What rounding did to some weights.

  Attributes:
    count, changed: weights, and how many are not what they were.
    largest: largest absolute difference.
    lost, kept: sums of squares, of the differences and of the weights.
  """

  count: int = 0
  changed: int = 0
  largest: float = 0.0
  lost: float = 0.0
  kept: float = 0.0

  @property
  def relative_rms(self) -> float:
    """Root mean square difference in units of the weights' own."""
    return math.sqrt(self.lost / self.kept) if self.kept else 0.0


  def compare(self, written: np.ndarray, given: np.ndarray) -> None:
    """Counts a piece: float32 arrays of one size, any shape."""
    written = np.asarray(written, np.float32).reshape(-1)
    given = np.asarray(given, np.float32).reshape(-1)
    self.count += given.size
    # float64 sums: of a billion squares, float32 would drop the last ones.
    self.kept += float(np.sum(np.square(given, dtype=np.float64)))
    # Zeros of either sign are the same weight.
    difference = written - given
    if not difference.any():
      return
    self.changed += int(np.count_nonzero(difference))
    self.largest = max(self.largest, float(np.max(np.abs(difference))))
    self.lost += float(np.sum(np.square(difference, dtype=np.float64)))

  def join(self, other: 'Change') -> None:
    """Adds what another one counted."""
    self.count += other.count
    self.changed += other.changed
    self.largest = max(self.largest, other.largest)
    self.lost += other.lost
    self.kept += other.kept

  def __str__(self):
    if not self.changed:
      return 'exact'
    return (
        f'{self.changed / self.count:.1%} rounded, by {self.largest:.2g} at '
        f'the most, {self.relative_rms:.2g} of their size (RMS)'
    )


class Changes:
  """Sums up changes by kind of weight; give `add` to a writer as `on_piece`.
  """

  def __init__(self):
    self.by_kind = {kind: Change() for kind in KINDS}

  @property
  def is_exact(self) -> bool:
    """Whether every weight is in the file as it was given."""
    return not any(c.changed for c in self.by_kind.values())

  def add(self, name: str, written, trained) -> int:
    """Counts a piece (see `checkpoint.OnPiece`); returns its weights."""
    change = self.by_kind[_kind(name)]
    size = _size(trained)
    if written is trained:
      change.count += size
    else:
      change.compare(written, trained)
    return size

  def lines(self) -> list[str]:
    """Says of each kind whether it is exact or how much it changed."""
    return [
        f'{kind:10} {change}' for kind, change in self.by_kind.items()
        if change.count
    ]


def _kind(name):
  last = name.rpartition('/')[2]
  if last == 'embedding':
    return 'embedding'
  return 'norms' if last.endswith('norm') else 'matrices'


def _size(piece):
  """Weights in a piece: an array, or `Stored` codes and scales."""
  return int(np.size(piece[1].codes if isinstance(piece, tuple) else piece))
