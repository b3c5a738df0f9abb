"""How much memory does a graphics card have?"""

import dataclasses
import re

from gemma_qat import errors

GIB = 2**30
# The sizes that cards come in, in GiB.
COMMON = (4, 6, 8, 12, 16, 24, 32, 48, 80)

# GiB as sold, or as the driver shows where it keeps some for error correction.
# What is sold in several sizes has one line each.
CARDS = {
    'GTX 1660': 6, 'RTX 2060': 6, 'RTX 2070': 8, 'RTX 2080': 8,
    'RTX 2080 Ti': 11,
    'RTX 3050': 8, 'RTX 3060': 12, 'RTX 3060 Ti': 8, 'RTX 3060 Laptop': 6,
    'RTX 3070': 8, 'RTX 3080 10GB': 10, 'RTX 3080 12GB': 12, 'RTX 3080 Ti': 12,
    'RTX 3090': 24, 'RTX 3090 Ti': 24,
    'RTX 4050 Laptop': 6, 'RTX 4060': 8, 'RTX 4060 Laptop': 8,
    'RTX 4060 Ti 8GB': 8, 'RTX 4060 Ti 16GB': 16, 'RTX 4070': 12,
    'RTX 4070 Laptop': 8, 'RTX 4070 Ti': 12, 'RTX 4080': 16,
    'RTX 4080 Laptop': 12, 'RTX 4090': 24, 'RTX 4090 Laptop': 16,
    'RTX 5060': 8, 'RTX 5070': 12, 'RTX 5070 Ti': 16, 'RTX 5080': 16,
    'RTX 5090': 32,
    'RTX A6000': 48, 'RTX 6000 Ada': 48,
    'T4': 15, 'L4': 22.5, 'A10': 22.5, 'A10G': 22.5, 'L40S': 45,
    'V100 16GB': 16, 'V100 32GB': 32, 'A100 40GB': 40, 'A100 80GB': 80,
    'H100': 79.6, 'H200': 140.4,
    'RX 7600': 8, 'RX 7800 XT': 16, 'RX 7900 XT': 20, 'RX 7900 XTX': 24,
}
_UNITS = {'': 1, 'g': 1, 'gb': 1, 'gib': 1, 'm': 2**-10, 'mb': 2**-10,
          'mib': 2**-10}


@dataclasses.dataclass(frozen=True)
class Card:
  """A card's name and its memory in bytes."""

  name: str
  num_bytes: int

  def __str__(self):
    """Says both the GiB that cards are sold by and the GB of file sizes."""
    size = f'{self.num_bytes / GIB:.4g} GiB = {self.num_bytes / 1e9:.1f} GB'
    return f'{self.name} ({size})' if self.name else size


def parse(text: str) -> Card:
  """Understands '24GB', '8188MiB', 'rtx-3090', 'NVIDIA GeForce RTX 4060'.

  A card's GB are GiB, 2^30 bytes: a '24 GB' card holds 25.8 * 10^9 bytes.

  Raises:
    UserError: neither a size nor a known name, or one of several cards.
  """
  size = re.fullmatch(r'(\d+(?:\.\d+)?)\s*([a-z]*)', text.strip().lower())
  if size and size[2] in _UNITS and float(size[1]) > 0:
    return Card('', round(float(size[1]) * _UNITS[size[2]] * GIB))
  wanted = _key(text)
  for name, gib in CARDS.items():
    if _key(name) == wanted:
      return Card(name, round(gib * GIB))
  near = [n for n in CARDS if wanted and _key(n).startswith(wanted)]
  raise errors.UserError(
      f'--gpu={text} is neither a size, such as 24GB, nor a card known here'
      + (f': did you mean {", ".join(near)}?' if near else '.')
  )


def smallest(num_bytes: int) -> int | None:
  """The smallest of COMMON, in GiB, that holds so many bytes, or None."""
  return next((gib for gib in COMMON if gib * GIB >= num_bytes), None)


def _key(name):
  """A name without maker, case, spaces and the 'GPU' that laptops add."""
  name = re.sub(r'nvidia|geforce|radeon|amd|tesla|gpu', '', name.lower())
  return re.sub(r'[^a-z0-9]', '', name)
