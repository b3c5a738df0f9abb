"""Which tensors does gemma.cpp want, and what of our weights is in each?

A tensor is [rows, cols] in C order, and most are our weights one after the
other: queries, then key and value of each head in turn, are one tensor, gate
and up another. So each is a list of pieces that can be read by themselves.
Norms stay w of the gain (1 + w). Types are the smallest that gemma.cpp's own
exporter lets a tensor have, but for the norms, which stay float32 as trained.
Source: gemma.cpp, gemma/tensor_info.cc and gemma/weights.h.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import gemma_cpp_fields
from gemma_qat.model import config as model_config
from gemma_qat.model import vision as vision_config
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import rules

# Ours -> theirs, which end in '_<layer>'.
_NORMS = {
    'attn_pre_norm': 'pre_att_ns', 'attn_post_norm': 'post_att_ns',
    'mlp_pre_norm': 'pre_ff_ns', 'mlp_post_norm': 'post_ff_ns',
    'attn_q_norm': 'query_norm', 'attn_k_norm': 'key_norm',
}
_VISION_OUTER = {
    'positions': ('img_pos_emb', 'F32'),
    'patches/bias': ('img_emb_bias', 'F32'),
    'post_norm/scale': ('enc_norm_scale', 'F32'),
    'post_norm/bias': ('enc_norm_bias', 'F32'),
    'projector/norm': ('mm_embed_norm', 'F32'),
}
_VISION_LAYER = {
    'attn_o/kernel': ('attn_out_w', 'BF16'),
    'attn_o/bias': ('attn_out_b', 'F32'),
    'mlp_up/kernel': ('linear_0_w', 'BF16'),
    'mlp_up/bias': ('linear_0_b', 'F32'),
    'mlp_down/kernel': ('linear_1_w', 'BF16'),
    'mlp_down/bias': ('linear_1_b', 'F32'),
    'norm_1/scale': ('ln_0_scale', 'F32'), 'norm_1/bias': ('ln_0_bias', 'F32'),
    'norm_2/scale': ('ln_1_scale', 'F32'), 'norm_2/bias': ('ln_1_bias', 'F32'),
}


class Part(NamedTuple):
  """Rows of one weight, or what becomes of it. arrange: of all its rows."""

  weight: str
  rows: slice = slice(None)
  arrange: Callable[[np.ndarray], np.ndarray] | None = None


class Planned(NamedTuple):
  """A tensor to be written. parts: in order; none means zeros."""

  name: str
  type: str
  rows: int
  cols: int
  parts: tuple[Part, ...]

  def described(self, scale: float) -> gemma_cpp_fields.Tensor:
    """Its line in the table of tensors."""
    return gemma_cpp_fields.Tensor(
        self.name, self.type, self.rows, self.cols, scale
    )


def text(c: model_config.ModelConfig) -> list[Planned]:
  """Plans the text model's tensors, in file order."""
  d, f, h = c.embed_dim, c.mlp_dim, c.head_dim
  specs = model_weights.layer_specs(c)
  planned = [
      Planned('c_embedding', 'BF16', c.vocab_size, d, (Part('embedding'),)),
      Planned('c_final_norm', 'F32', 1, d, (Part('final_norm'),)),
  ]
  for i in range(c.num_layers):
    part = lambda name, rows=slice(None), i=i: Part(f'layer_{i}/{name}', rows)
    heads = [
        part(name, slice(head, head + 1))
        for head in range(c.num_kv_heads) for name in ('attn_k', 'attn_v')
    ]
    rows = (c.num_heads + 2 * c.num_kv_heads) * h
    planned += [
        Planned(f'qkv_ein_{i}', 'SFP', rows, d, (part('attn_q'), *heads)),
        # The heads side by side; gemma.cpp makes this of the exporter's
        # [heads * D, H] 'att_ein' when it does not find it.
        Planned(f'att_w_{i}', 'SFP', d, c.num_heads * h, (part('attn_o'),)),
        Planned(
            f'gating_ein_{i}', 'SFP', 2 * f, d,
            (part('mlp_gate'), part('mlp_up')),
        ),
        Planned(f'linear_w_{i}', 'SFP', d, f, (part('mlp_down'),)),
    ]
    planned += [
        Planned(f'{theirs}_{i}', 'F32', 1, specs[ours].shape[0], (part(ours),))
        for ours, theirs in _NORMS.items()
    ]
  return planned


def vision(c: vision_config.VisionConfig) -> list[Planned]:
  """Plans the tensors of tower and projector, in file order."""
  d, n = c.width, c.num_heads
  specs = vision_config.specs(c)
  planned = [
      _whole(specs, ours, *theirs) for ours, theirs in _VISION_OUTER.items()
  ]
  planned += [
      # Colours innermost.
      Planned(
          'img_emb_kernel', 'BF16', d, 3 * c.patch_size**2,
          (Part('patches/kernel', arrange=lambda w: w.transpose(0, 2, 3, 1)),),
      ),
      Planned(
          'img_head_kernel', 'BF16', c.text_dim, d,
          (Part('projector/kernel', arrange=np.transpose),),
      ),
      # Gemma 3's projector has no bias, but the loader insists on one.
      Planned('img_head_bias', 'F32', 1, c.text_dim, ()),
  ]
  for i in range(c.num_layers):
    for ours, (theirs, kind) in _VISION_LAYER.items():
      planned.append(_whole(specs, f'layer_{i}/{ours}', f'{theirs}_{i}', kind))
    for end, kind, cols in (('kernel', 'BF16', d), ('bias', 'F32', d // n)):
      # Query, key and value of each head in turn.
      parts = tuple(
          Part(f'layer_{i}/{name}/{end}', slice(k * d // n, (k + 1) * d // n))
          for k in range(n) for name in ('attn_q', 'attn_k', 'attn_v')
      )
      name = f'qkv_ein_{"w" if end == "kernel" else "b"}_{i}'
      rows = 3 * d if end == 'kernel' else 3 * n
      planned.append(Planned(name, kind, rows, cols, parts))
  return planned


def values(
    weights: checkpoints.Weights, planned: Planned, source: str
) -> Iterator[tuple[str, np.ndarray]]:
  """Reads a tensor's values in order, float32, with the weight's name.

  Raises:
    UserError: some are not finite (names the weight).
  """
  if not planned.parts:
    yield '', np.zeros(planned.rows * planned.cols, np.float32)
  for part in planned.parts:
    for values_ in _read(weights, part):
      rules.check_finite(f'{source}: {part.weight}', values_)
      yield part.weight, values_


def _read(weights, part):
  if part.rows == slice(None) and part.arrange is None:
    for _, piece in weights.pieces(part.weight):
      yield checkpoints.to_float32(piece)
    return
  piece = weights.entries[part.weight].read(part.rows)
  piece = checkpoints.to_float32(piece)
  yield piece if part.arrange is None else part.arrange(piece)


def _whole(specs, ours, theirs, kind):
  """A tensor that is one weight as it is; vectors are one row."""
  *rows, cols = specs[ours].shape
  return Planned(theirs, kind, int(np.prod(rows)), cols, (Part(ours),))
