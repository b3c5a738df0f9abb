"""Does mlx-lm read our folders, and what logits does it compute?

Run by a Python that has mlx and mlx-lm (mlx[cpu] on Linux); nothing of
gemma_qat is imported:

    python mlx_folder.py FOLDER --tokens tokens.npy --out logits.npy

tokens.npy: int32 [L]; logits.npy: float32 [L, V].
"""

import argparse
import pathlib

import mlx.core as mx
import mlx_lm
from mlx import utils as mlx_utils
import numpy as np


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--tokens', type=pathlib.Path)
  parser.add_argument('--out', type=pathlib.Path)
  parser.add_argument('--text', default='The  value\n\n  of <b>x</b>: \u00e9')
  arguments = parser.parse_args()
  mx.set_default_device(mx.cpu)
  model, tokenizer = mlx_lm.load(str(arguments.folder))
  parameters = dict(mlx_utils.tree_flatten(model.parameters()))
  kinds = {}
  for name, array in parameters.items():
    key = f'{name.rpartition(".")[2]} {array.dtype}'
    kinds[key] = kinds.get(key, 0) + 1
  print(f'{type(model).__module__}, {kinds}')
  print(f'tokens: {tokenizer.encode(arguments.text)}')
  if arguments.tokens:
    tokens = mx.array(np.load(arguments.tokens))[None]
    logits = model(tokens)[0]
    print(f'logits {logits.dtype}')
    logits = np.array(logits.astype(mx.float32))
    print(f'logits {logits.shape}, from {logits.min():.3f} to '
          f'{logits.max():.3f}')
    if arguments.out:
      np.save(arguments.out, logits)


if __name__ == '__main__':
  main()
