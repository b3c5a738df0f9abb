"""Which is the smallest GGUF that llama.cpp runs as a Gemma 3?

Eight layers (one whole group of five local and a global one, and a tail), every
structural feature switched on: grouped queries, a sliding window shorter than
the text, RoPE scaling. The sizes are those of the variant `tiny`. The random
weights are of a size that gives logits with a spread of about 2.
"""

import itertools
import os

import gguf
import numpy as np

LAYERS, D, F, N, K, H, V = 8, 64, 128, 4, 2, 32, 512
WINDOW, CONTEXT, ROPE_FACTOR = 16, 512, 8.0
PAD, EOS, BOS, UNK = 0, 1, 2, 3


def vocabulary(size: int = V) -> tuple[list[str], list[float], list[int]]:
  """Returns the pieces, their scores and their types, `size` <= V of each.

  Specials, the 256 bytes, newline and the printable ASCII characters, and
  syllables that the characters merge into.
  """
  types = gguf.TokenType
  pieces = ['<pad>', '<eos>', '<bos>', '<unk>']
  kinds = [types.CONTROL] * 3 + [types.UNKNOWN]
  pieces += [f'<0x{byte:02X}>' for byte in range(256)]
  kinds += [types.BYTE] * 256
  # SentencePiece writes a space as U+2581.
  pieces += ['\n', '\u2581'] + [chr(c) for c in range(33, 127)]
  pieces += map(''.join, itertools.product('tnrsdlcmpbfghvwk', 'eaoiuyhr'))
  pieces = list(dict.fromkeys(pieces))
  pieces += map(''.join, itertools.product('\u2581', 'tnrsdlcmpbfghvwkeaoiuy'))
  pieces += map(''.join, itertools.product('eaoiu', 'nrst'))
  pieces = pieces[:size]
  kinds += [types.NORMAL] * (size - len(kinds))
  # Merges with a higher score come first.
  scores = [0.0 if i < 260 else float(260 - i) for i in range(size)]
  return pieces, scores, [int(kind) for kind in kinds]


def random_tensors(seed: int = 0) -> dict[str, np.ndarray]:
  """Returns float32 weights by GGUF name: [outputs, inputs], norms as 1 + w."""
  rng = np.random.default_rng(seed)

  def matrix(outputs, inputs):
    return rng.normal(0, inputs**-0.5, (outputs, inputs)).astype(np.float32)

  def norm(width):
    return rng.normal(1, 0.1, width).astype(np.float32)

  tensors = {
      'token_embd.weight': 2 * matrix(V, D),
      'output_norm.weight': norm(D),
  }
  for i in range(LAYERS):
    layer = {
        'attn_q': matrix(N * H, D),
        'attn_k': matrix(K * H, D),
        'attn_v': matrix(K * H, D),
        'attn_output': matrix(D, N * H),
        'ffn_gate': matrix(F, D),
        'ffn_up': matrix(F, D),
        'ffn_down': matrix(D, F),
        'attn_q_norm': norm(H),
        'attn_k_norm': norm(H),
        'attn_norm': norm(D),
        'post_attention_norm': norm(D),
        'ffn_norm': norm(D),
        'post_ffw_norm': norm(D),
    }
    tensors |= {f'blk.{i}.{name}.weight': a for name, a in layer.items()}
  return tensors


def write(
    path: str | os.PathLike,
    tensors: dict[str, np.ndarray] | None = None,
    matrix_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> None:
  """Writes a GGUF file with the tiny vocabulary and sizes.

  Args:
    path: where to.
    tensors: float32 arrays by GGUF name; None takes `random_tensors()`. The
      rows of the embedding say how long the vocabulary is.
    matrix_type: what the matrices and the embedding are stored in; norms stay
      float32.
  """
  tensors = tensors or random_tensors()
  writer = gguf.GGUFWriter(path, 'gemma3')
  writer.add_context_length(CONTEXT)
  writer.add_embedding_length(D)
  writer.add_block_count(LAYERS)
  writer.add_feed_forward_length(F)
  writer.add_head_count(N)
  writer.add_head_count_kv(K)
  writer.add_key_length(H)
  writer.add_value_length(H)
  writer.add_layer_norm_rms_eps(1e-6)
  writer.add_rope_freq_base(1_000_000.0)
  writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
  writer.add_rope_scaling_factor(ROPE_FACTOR)
  writer.add_sliding_window(WINDOW)
  pieces, scores, types = vocabulary(len(tensors['token_embd.weight']))
  writer.add_tokenizer_model('llama')
  writer.add_tokenizer_pre('default')
  writer.add_token_list(pieces)
  writer.add_token_scores(scores)
  writer.add_token_types(types)
  writer.add_pad_token_id(PAD)
  writer.add_eos_token_id(EOS)
  writer.add_bos_token_id(BOS)
  writer.add_unk_token_id(UNK)
  writer.add_add_bos_token(True)
  writer.add_add_eos_token(False)
  writer.add_add_space_prefix(False)
  for name, array in tensors.items():
    kind = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else matrix_type
    writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
