"""How fast is a device, how much does it hold, how fast are its links?

Dense bfloat16 products with float32 accumulation, as published. None where
nothing is known: callers then say FLOP/s and no utilisation. Sources:

- TPUs: cloud.google.com/tpu/docs/v2, v3, v4, v5e, v5p, v6e, tpu7x (tables "key
  specifications"). A device is what JAX calls one: half a chip of v2, v3 and
  TPU7x, a whole one of the others. The tables give links in both directions
  together; half of it is what a device sends. v4: 2,400 Gbit/s a direction.
  Memory: what libtpu 0.0.42 says that a program can have. Clocks: "TPU v4"
  (Jouppi et al. 2023, table 4) for v2 to v4; v5e and v5p follow from the peak
  and the four units of 128 x 128 a core that their tables name.
- H100, H200, B200, A100, L4, L40S, A10, T4: NVIDIA's data sheets, whose
  figures with sparsity are halved. A10G: AWS's figure, 70 TFLOP/s.
- RTX 3090: GA102 whitepaper, appendix A; RTX 4080, 4090: Ada whitepaper,
  appendix A; RTX 5090: Blackwell RTX whitepaper; A6000 and A40: GA102
  whitepaper. All "BF16 tensor, FP32 accumulate".
- Turing and Volta (T4, V100) have no bfloat16 tensor cores: no peak here.
- NVIDIA's memory is what the driver shows where that is less than sold.
- Links: NVLink's total halved for one direction; otherwise PCI Express x16,
  32 GB/s in generation 4, 16 in 3, 64 in 5.
"""

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
  """What is published of one kind of device.

  Attributes:
    name: as people say it, 'H100' or 'v5p'.
    flops: bfloat16 FLOP/s, dense; None where products are not in hardware.
    memory_bytes: of its own memory.
    memory_bandwidth: bytes/s between that memory and its cores.
    link_bandwidth: bytes/s that it can send to others, all links together.
    clock: of a TPU's cores in Hz, where it is published.
  """

  name: str
  flops: float | None
  memory_bytes: int
  memory_bandwidth: float
  link_bandwidth: float
  clock: float | None


def _device(name, teraflops, gib, gigabytes, links, gigahertz=None):
  flops = None if teraflops is None else teraflops * 1e12
  clock = None if gigahertz is None else gigahertz * 1e9
  return Device(
      name, flops, round(gib * GIB), gigabytes * 1e9, links * 1e9, clock
  )


# TFLOP/s, GiB, GB/s of memory, GB/s of links in one direction, GHz.
TPUS = {d.name: d for d in (
    _device('v2', 22.5, 7.48, 350, 62, 0.7),
    _device('v3', 61.5, 15.48, 450, 82, 0.94),
    _device('v4', 275, 30.75, 1200, 300, 1.05),
    _device('v5e', 197, 15.75, 819, 200, 1.5),
    _device('v5p', 459, 95.74, 2765, 600, 1.75),
    _device('v6e', 918, 31.25, 1638, 400),
    _device('tpu7x', 1153.5, 94.75, 3690, 300),
)}
# A more particular name stands before the one that it begins with.
GPUS = {d.name: d for d in (
    _device('B200', 2250, 180, 8000, 900),
    _device('H200', 989.4, 140.4, 4800, 450),
    _device('H100 PCIe', 756, 79.6, 2000, 64),
    _device('H100 NVL', 835, 94, 3900, 64),
    _device('H100', 989.4, 79.6, 3350, 450),
    _device('A100 PCIe 40GB', 312, 40, 1555, 32),
    _device('A100 PCIe 80GB', 312, 80, 1935, 32),
    _device('A100 40GB', 312, 40, 1555, 300),
    _device('A100 80GB', 312, 80, 2039, 300),
    _device('L40S', 362, 45, 864, 32),
    _device('L4', 121, 22.5, 300, 32),
    _device('A10G', 70, 22.5, 600, 32),
    _device('A10', 125, 22.5, 600, 32),
    _device('A40', 149.7, 45, 696, 32),
    _device('T4', None, 15, 320, 16),
    _device('V100 16GB', None, 16, 900, 150),
    _device('V100 32GB', None, 32, 900, 150),
    _device('RTX A6000', 154.8, 48, 768, 32),
    _device('RTX 3090', 71, 24, 936, 32),
    _device('RTX 4080', 97.5, 16, 717, 32),
    _device('RTX 4090', 165.2, 24, 1008, 32),
    _device('RTX 5090', 209.5, 32, 1792, 64),
)}
# JAX's names for kinds of TPU, and the words of `gcloud`.
_TPU_KINDS = {
    'TPU v2': 'v2', 'TPU v3': 'v3', 'TPU v4': 'v4', 'TPU v5 lite': 'v5e',
    'TPU v5e': 'v5e', 'v5litepod': 'v5e', 'TPU v5': 'v5p', 'TPU v5p': 'v5p',
    'TPU v6 lite': 'v6e', 'TPU v6e': 'v6e', 'TPU7x': 'tpu7x',
}


def find(kind: str) -> Device | None:
  """Recognises a device by JAX's `device_kind`, or by a short name.

  'TPU v5 lite', 'v5e', 'NVIDIA H100 80GB HBM3', 'NVIDIA A100-SXM4-40GB',
  'H100'. What is sold in several sizes needs its size in the name.

  Returns:
    None for what is not listed, such as a CPU.
  """
  kind = kind.strip()
  tpu = TPUS.get(_TPU_KINDS.get(kind, kind.lower()))
  if tpu is not None:
    return tpu
  said = _words(kind)
  return next(
      (d for d in GPUS.values() if _words(d.name) <= said), None
  )


def _words(name):
  """The words of a GPU's name, without what says nothing of its speed.

  'Ti', 'SUPER' and 'Laptop' name other devices: they may not be passed over.
  """
  words = re.findall(r'[a-z0-9]+', name.lower())
  if {'ti', 'super', 'laptop', 'max', 'd', 'mig'} & set(words):
    return frozenset({' '.join(words)})
  return frozenset(words)
