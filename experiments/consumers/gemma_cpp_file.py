"""What does an .sbs file hold, read by a loader of its own?

No package loads Gemma 3 for gemma.cpp. This reads a file as gemma.cpp's
blob_store, fields and sfp code describe it, and nothing of gemma_qat is
imported:

    python gemma_cpp_file.py FILE.sbs --against FOLDER

FOLDER: the same model for transformers, in float32 or bfloat16, one file of
safetensors. Every matrix has to hold the nearest numbers of SFP8.
"""

import argparse
import pathlib
import struct

import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors

_MAGIC = 0x0A534253
_DTYPES = {1: np.dtype('<f4'), 2: np.dtype(ml_dtypes.bfloat16)}
_SFP = 3
# Half a step of two mantissa bits, and what rounding to bfloat16 first moves.
_NEAREST = 2**-3 + 2**-8
# Of the first step above zero, below which nothing is relative.
_SMALLEST = 0.625 * 2.0**-22


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('file', type=pathlib.Path)
  parser.add_argument('--against', type=pathlib.Path, required=True)
  arguments = parser.parse_args()
  data = np.fromfile(arguments.file, np.uint8)
  blobs = read_blobs(data)
  tensors = read_tensors(blobs)
  print(f'{len(blobs)} blobs, {len(tensors)} tensors')
  given = safetensors.load_file(arguments.against / 'model.safetensors')
  worst, compared = 0.0, 0
  for name, expected in matrices(given):
    expected = np.asarray(expected, np.float32)
    found = tensors[name].reshape(expected.shape)
    error = np.abs(found - expected)
    error /= np.maximum(np.abs(expected), _SMALLEST / _NEAREST)
    worst, compared = max(worst, float(error.max())), compared + 1
  print(f'{compared} tensors compared, largest relative difference '
        f'{worst:.5f}, allowed {_NEAREST:.5f}')
  raise SystemExit(worst > _NEAREST)


def read_blobs(data: np.ndarray) -> dict[str, np.ndarray]:
  """Reads the directory at the end: key -> bytes."""
  magic, count, size = struct.unpack('<IIQ', data[-16:].tobytes())
  if magic != _MAGIC or size != len(data):
    raise SystemExit('no header at the end of the file')
  words = data[-16 - 32 * count : -16].tobytes()
  blobs = {}
  for i in range(count):
    key = words[16 * i : 16 * i + 16].rstrip(b'\0').decode()
    start, length = struct.unpack_from('<QQ', words, 16 * (count + i))
    if start % 256 or start + length > len(data):
      raise SystemExit(f'{key} lies outside')
    blobs[key] = data[start : start + length]
  return blobs


def read_tensors(blobs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Decodes every tensor of the table: name -> float32 [rows, cols]."""
  words, at, tensors = blobs['toc'].view('<u4'), 0, {}
  while at < len(words):
    length, name_length = int(words[at]), int(words[at + 1])
    first = at + 2 + name_length
    name = words[at + 2 : first].tobytes().rstrip(b'\0').decode()
    kind, _, _, rows, cols = (int(w) for w in words[first : first + 5])
    scale = words[first + 5 : first + 6].view('<f4')[0]
    if kind == _SFP:
      values = decode_sfp(blobs[name]) * scale
    else:
      values = blobs[name].view(_DTYPES[kind]).astype(np.float32)
    tensors[name] = values.reshape(rows, cols)
    at += 1 + length
  return tensors


def decode_sfp(codes: np.ndarray) -> np.ndarray:
  """By bits: what bfloat16 pattern does each of the 255 codes stand for?"""
  magnitude = np.arange(256, dtype=np.uint32) & 0x7F
  bits = np.where(
      magnitude < 64, 0x3400 + (magnitude << 5), 0x3800 + (magnitude << 4)
  )
  bits = np.where(magnitude == 0, 0, bits)
  sign = (np.arange(256, dtype=np.uint32) & 0x80) << 8
  table = ((bits | sign) << 16).astype(np.uint32).view(np.float32)
  return table[codes]


def matrices(given: dict[str, np.ndarray]):
  """Yields gemma.cpp's name and the Hugging Face tensors it is made of."""
  yield 'c_embedding', given['model.embed_tokens.weight']
  layer = 0
  while (prefix := f'model.layers.{layer}.') + 'mlp.up_proj.weight' in given:
    get = lambda name: np.asarray(given[f'{prefix}{name}.weight'], np.float32)
    # Query heads first, then key and value of each key/value head in turn.
    head_dim = len(get('self_attn.q_norm'))
    keys, values = (get(f'self_attn.{n}_proj') for n in 'kv')
    width = keys.shape[1]
    pairs = np.stack(
        [k.reshape(-1, head_dim, width) for k in (keys, values)], axis=1
    ).reshape(-1, width)
    yield f'qkv_ein_{layer}', np.concatenate([get('self_attn.q_proj'), pairs])
    yield f'gating_ein_{layer}', np.concatenate(
        [get('mlp.gate_proj'), get('mlp.up_proj')]
    )
    yield f'linear_w_{layer}', get('mlp.down_proj')
    yield f'att_w_{layer}', get('self_attn.o_proj')
    layer += 1


if __name__ == '__main__':
  main()
