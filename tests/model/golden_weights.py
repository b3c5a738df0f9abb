"""Which tiny models are compared with transformers, and on which tokens?

NumPy alone: `make_goldens.py` runs it beside torch, the test beside JAX.
"""

import zlib

import numpy as np

# Every structure that a Gemma 3 has, by the names of `ModelConfig`.
CASES = {
    # Two whole groups of six layers and a tail, heads in pairs, positions of
    # the global layers divided by 8, text longer than the window.
    'grouped': dict(
        num_layers=14, embed_dim=64, mlp_dim=96, num_heads=4, num_kv_heads=2,
        head_dim=32, sliding_window=16, rope_scaling=8.0, query_scale_dim=32,
    ),
    # As the 270M: one key/value head, no scaling of positions.
    'one_kv_head': dict(
        num_layers=7, embed_dim=64, mlp_dim=96, num_heads=4, num_kv_heads=1,
        head_dim=32, sliding_window=12, rope_scaling=1.0, query_scale_dim=32,
    ),
    # As the 27B: queries scaled by D / N, which is not the head width.
    'query_scale': dict(
        num_layers=8, embed_dim=48, mlp_dim=96, num_heads=4, num_kv_heads=2,
        head_dim=16, sliding_window=16, rope_scaling=8.0, query_scale_dim=12,
    ),
}
VOCABULARY = 256
TOKENS = np.random.default_rng(0).integers(3, VOCABULARY, (2, 40), np.int32)


def shapes(case: dict) -> dict[str, tuple[int, ...]]:
  """Returns the by-layer shapes, as transformers has them: [outputs, inputs].
  """
  d, f, h = case['embed_dim'], case['mlp_dim'], case['head_dim']
  n, k = case['num_heads'] * h, case['num_kv_heads'] * h
  layer = {
      'attn_pre_norm': (d,), 'attn_post_norm': (d,), 'mlp_pre_norm': (d,),
      'mlp_post_norm': (d,), 'attn_q_norm': (h,), 'attn_k_norm': (h,),
      'attn_q': (n, d), 'attn_k': (k, d), 'attn_v': (k, d), 'attn_o': (d, n),
      'mlp_gate': (f, d), 'mlp_up': (f, d), 'mlp_down': (d, f),
  }
  return {'embedding': (VOCABULARY, d), 'final_norm': (d,)} | {
      f'layer_{i}/{name}': shape
      for i in range(case['num_layers'])
      for name, shape in layer.items()
  }


def make(case: dict) -> dict[str, np.ndarray]:
  """Draws float32 weights that depend on their name alone.

  Gains lie 0.3 about 1, so that 1 + w and w give different numbers; matrices
  are large enough for a sharp attention.
  """
  weights = {}
  for name, shape in shapes(case).items():
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    spread = 0.3 if len(shape) == 1 else 2 * shape[-1] ** -0.5
    weights[name] = (spread * draw.standard_normal(shape)).astype(np.float32)
  return weights
