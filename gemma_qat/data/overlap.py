"""Which spans of text do two collections share?"""

from collections.abc import Iterable, Sequence

import numpy as np

# Two texts share a span if this many characters in a row are equal.
SPAN = 200

_BASE = np.uint64(0x9E3779B97F4A7C15)  # Odd, so it has an inverse mod 2**64.
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_TABLE_BITS = 24


class HeldOut:
  """The spans of held-out texts, ready for look-ups.

  Every window of `SPAN` characters is kept as a 64-bit rolling hash: 8 bytes
  a character and a table of 16 MB. The chance of one false alarm is 4e-7 for
  half a million held-out and 16 million training characters.
  """

  def __init__(self, texts: Iterable[str]):
    normal = [_normalise(t) for t in texts]
    # A text shorter than a span is compared as a whole.
    self._whole = {t for t in normal if len(t) < SPAN}
    hashes = [_window_hashes(t) for t in normal]
    self._hashes = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))
    # Most look-ups end at this table, which fits the cache.
    self._table = np.zeros(1 << _TABLE_BITS, bool)
    self._table[_slot(self._hashes)] = True

  def find(self, text: str) -> str | None:
    """Returns a shared span, whitespace normalised; None if there is none."""
    normal = _normalise(text)
    if normal in self._whole:
      return normal
    starts = self._shared_starts(normal)
    return normal[starts[0] : starts[0] + SPAN] if len(starts) else None

  def without_shared(self, text: str) -> str:
    """Returns the text less its paragraphs that touch a shared span."""
    while self.find(text) is not None:
      paragraphs = text.split('\n\n')
      normal = [_normalise(p) for p in paragraphs]
      # Positions in the normalised text, where one space joins paragraphs.
      lengths = np.array([len(p) + bool(p) for p in normal])
      ends = np.cumsum(lengths)
      joined = ' '.join(p for p in normal if p)
      if joined in self._whole:
        return ''
      shared = np.zeros(len(joined) + 2, int)
      starts = self._shared_starts(joined)
      np.add.at(shared, starts, 1)
      np.add.at(shared, starts + SPAN, -1)
      covered = np.concatenate([[0], np.cumsum(np.cumsum(shared) > 0)])
      touched = covered[ends] > covered[ends - lengths]
      text = '\n\n'.join(
          p for p, drop in zip(paragraphs, touched, strict=True) if not drop
      )
    return text

  def _shared_starts(self, normal: str) -> np.ndarray:
    hashes = _window_hashes(normal)
    candidates = np.flatnonzero(self._table[_slot(hashes)])
    if not len(candidates):
      return candidates
    wanted = hashes[candidates]
    # Not np.isin: it would sort all held-out hashes for every text.
    places = np.searchsorted(self._hashes, wanted) % len(self._hashes)
    return candidates[self._hashes[places] == wanted]


def remove_overlap(
    train_texts: Sequence[str], held_out_texts: Sequence[str]
) -> list[str]:
  """Returns the training texts less the paragraphs that held-out texts hold.

  One text in, one out (perhaps empty). Paragraphs are separated by empty
  lines; one that touches a shared span of 200 characters is dropped whole.
  """
  held_out = HeldOut(held_out_texts)
  return [held_out.without_shared(text) for text in train_texts]


def _normalise(text: str) -> str:
  return ' '.join(text.split())


def _slot(hashes: np.ndarray) -> np.ndarray:
  return (hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)


def _window_hashes(text: str) -> np.ndarray:
  """Hashes every window of `SPAN` characters, [len(text) - SPAN + 1] uint64.

  hash(i) = sum over j < SPAN of mix(text[i + j]) * base**j, modulo 2**64, from
  prefix sums: exact, because base is odd and can be divided by.
  """
  count = len(text) - SPAN + 1
  if count <= 0:
    return np.zeros(0, np.uint64)
  raw = text.encode('utf-32-le', 'surrogatepass')
  codes = np.frombuffer(raw, np.uint32).astype(np.uint64)
  # Spread the characters over 64 bits, or short codes would collide.
  codes = (codes + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
  codes ^= codes >> np.uint64(29)
  codes *= np.uint64(0x94D049BB133111EB)
  powers = np.cumprod(np.full(len(text), _BASE))
  sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * powers)])
  inverses = np.cumprod(np.full(count, _INVERSE))
  hashes = (sums[SPAN:] - sums[:count]) * inverses
  # The top bits choose the table slot: mix the low ones in.
  return (hashes ^ (hashes >> np.uint64(32))) * _BASE
