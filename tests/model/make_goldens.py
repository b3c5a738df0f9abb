"""Writes goldens.npz: what transformers computes for `golden_weights.CASES`.

  pip install torch==2.13.0 transformers==5.23.0
  python tests/model/make_goldens.py

The versions that wrote the file stand in it.
"""

import pathlib

import golden_weights
import numpy as np
import torch
import transformers

# Our name -> theirs, behind 'model.' or 'model.layers.<i>.'.
_OUTER = {'embedding': 'embed_tokens', 'final_norm': 'norm'}
_LAYER = {
    'attn_pre_norm': 'input_layernorm',
    'attn_post_norm': 'post_attention_layernorm',
    'mlp_pre_norm': 'pre_feedforward_layernorm',
    'mlp_post_norm': 'post_feedforward_layernorm',
    'attn_q_norm': 'self_attn.q_norm',
    'attn_k_norm': 'self_attn.k_norm',
    'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj',
    'attn_o': 'self_attn.o_proj',
    'mlp_gate': 'mlp.gate_proj',
    'mlp_up': 'mlp.up_proj',
    'mlp_down': 'mlp.down_proj',
}


def main():
  """Runs every case and writes the file beside this script."""
  arrays = {
      'versions': np.array(
          [f'torch {torch.__version__}',
           f'transformers {transformers.__version__}']
      )
  }
  for name, case in golden_weights.CASES.items():
    model = _model(case)
    tokens = torch.tensor(golden_weights.TOKENS, dtype=torch.long)
    with torch.no_grad():
      logits = model(tokens).logits
    assert logits.dtype == torch.float32
    # A quarter of the vocabulary tells as much as all of it.
    arrays[name] = logits[:, :, ::4].numpy()
    print(f'{name}: logits up to {logits.abs().max():.2f}')
  path = pathlib.Path(__file__).parent / 'goldens.npz'
  np.savez_compressed(path, **arrays)
  print(f'{path}: {path.stat().st_size} bytes')


def _model(case):
  layers = case['num_layers']
  is_global = [(i + 1) % 6 == 0 for i in range(layers)]
  rope_global = {'rope_type': 'default', 'rope_theta': 1_000_000.0}
  if case['rope_scaling'] != 1:
    rope_global |= {'rope_type': 'linear', 'factor': case['rope_scaling']}
  config = transformers.Gemma3TextConfig(
      vocab_size=golden_weights.VOCABULARY,
      hidden_size=case['embed_dim'],
      intermediate_size=case['mlp_dim'],
      num_hidden_layers=layers,
      num_attention_heads=case['num_heads'],
      num_key_value_heads=case['num_kv_heads'],
      head_dim=case['head_dim'],
      query_pre_attn_scalar=case['query_scale_dim'],
      sliding_window=case['sliding_window'],
      layer_types=[
          'full_attention' if g else 'sliding_attention' for g in is_global
      ],
      rope_parameters={
          'full_attention': rope_global,
          'sliding_attention': {
              'rope_type': 'default', 'rope_theta': 10_000.0
          },
      },
      max_position_embeddings=512,
      attn_implementation='eager',
  )
  model = transformers.Gemma3ForCausalLM(config).to(torch.float32).eval()
  state = {}
  for name, weight in golden_weights.make(case).items():
    layer, _, rest = name.rpartition('/')
    prefix = f'layers.{layer.removeprefix("layer_")}.' if layer else ''
    theirs = _LAYER[rest] if layer else _OUTER[rest]
    state[f'model.{prefix}{theirs}.weight'] = torch.from_numpy(weight)
  state['lm_head.weight'] = state['model.embed_tokens.weight']
  model.load_state_dict(state, strict=True)
  return model


if __name__ == '__main__':
  main()
