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
    change.count += size
    if written is not trained:
      self._compare(change, written, trained)
    return size

  def lines(self) -> list[str]:
    """Says of each kind whether it is exact or how much it changed."""
    lines = []
    for kind, c in self.by_kind.items():
      if not c.count:
        continue
      if not c.changed:
        lines.append(f'{kind:10} exact')
        continue
      lines.append(
          f'{kind:10} {c.changed / c.count:.1%} rounded, by {c.largest:.2g} at '
          f'the most, {c.relative_rms:.2g} of their size (RMS)'
      )
    return lines

  def _compare(self, change, written, trained):
    written = np.asarray(written, np.float32).reshape(-1)
    trained = np.asarray(trained, np.float32).reshape(-1)
    # Zeros of either sign are the same weight.
    difference = written - trained
    if not difference.any():
      return
    change.changed += int(np.count_nonzero(difference))
    change.largest = max(change.largest, float(np.max(np.abs(difference))))
    # float64 sums: of a billion squares, float32 would drop the last ones.
    change.lost += float(np.sum(np.square(difference, dtype=np.float64)))
    change.kept += float(np.sum(np.square(trained, dtype=np.float64)))



def _kind(name):
  last = name.rpartition('/')[2]
  if last == 'embedding':
    return 'embedding'
  return 'norms' if last.endswith('norm') else 'matrices'


def _size(piece):
  """Weights in a piece: an array, or `Stored` codes and scales."""
  return int(np.size(piece[1].codes if isinstance(piece, tuple) else piece))
