"""Does Google's own library read what was exported, and compute the same?

Runs with the library's Python, not ours. `gemma` 3.3.0 needs older companions
than pip finds for it: requirements/gemma.txt has some that work together.

Run by that Python; nothing of gemma_qat is imported:

    python gemma_library.py FOLDER --tokens tokens.npy --out logits.npy

tokens.npy: int32 [L]; logits.npy: float32 [L, V]. What `load_params` returned
is printed, one line a tensor with the beginning of its SHA-256.
"""

import argparse
import dataclasses
import hashlib

from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('folder')
  parser.add_argument('--tokens', required=True)
  parser.add_argument('--out', required=True)
  parser.add_argument(
      '--dtype', default='float32', help='of the computation (float32)'
  )
  parser.add_argument(
      '--text-only', action='store_true', help='leave the tower out'
  )
  arguments = parser.parse_args()
  params = gm.ckpts.load_params(
      arguments.folder, text_only=arguments.text_only
  )
  for path, array in jax.tree_util.tree_leaves_with_path(params):
    digest = hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    print(f'{name} {array.dtype} {array.shape} {digest[:16]}')
  dtype = jnp.dtype(arguments.dtype)
  model = make_model(params, dtype)
  params = jax.tree.map(lambda a: a.astype(dtype), params)
  tokens = np.load(arguments.tokens)[None]
  with jax.default_matmul_precision('highest'):
    logits = model.apply({'params': params}, jnp.asarray(tokens)).logits
  logits = np.asarray(logits, np.float32)[0]
  np.save(arguments.out, logits)
  print(
      f'{type(model).__name__} logits {logits.shape}: mean '
      f'{logits.mean():.6f}, standard deviation {logits.std():.6f}, largest '
      f'{np.abs(logits).max():.4f}'
  )


def make_model(params, dtype):
  """Returns the library's model of these sizes, or one made to measure."""
  layers = sum(name.startswith('layer_') for name in params)
  vocabulary, width = params['embedder']['input_embedding'].shape
  for known in (
      gm.nn.Gemma3_270M, gm.nn.Gemma3_1B, gm.nn.Gemma3_4B, gm.nn.Gemma3_12B,
      gm.nn.Gemma3_27B,
  ):
    config = known().config
    if (len(config.attention_types), config.embed_dim) == (layers, width):
      text = dataclasses.replace(config, vision_encoder=None)
      return known(config=text, dtype=dtype)
  # The `tiny` variant: sizes from the shapes, window and RoPE as it has them.
  attention = params['layer_0']['attn']
  config = dataclasses.replace(
      gm.nn.Gemma3_4B().config,
      num_embed=vocabulary,
      embed_dim=width,
      hidden_dim=params['layer_0']['mlp']['linear'].shape[0],
      num_heads=attention['q_einsum']['w'].shape[0],
      num_kv_heads=attention['kv_einsum']['w'].shape[1],
      head_dim=attention['q_einsum']['w'].shape[2],
      attention_types=gm.nn.config.make_attention_layers_types(
          gm.nn.config.GEMMA3_ATTENTION_PATTERN, num_layers=layers
      ),
      sliding_window_size=16,
      vision_encoder=None,
  )
  return gm.nn.Transformer(config=config, dtype=dtype)


if __name__ == '__main__':
  main()
