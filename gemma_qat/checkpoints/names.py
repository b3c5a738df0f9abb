"""What is each weight called in each file layout?

The one table. Another layout is another column. In GGUF and Hugging Face
files every matrix is two-dimensional, [outputs, inputs] with heads flattened
into either; both are plain reshapes of our arrays.
"""

from typing import NamedTuple

from gemma_qat import errors
from gemma_qat.model import config as model_config
from gemma_qat.model import vision as vision_config
from gemma_qat.model import weights


# Gemma's tokens. Some files pad the embedding with rows beyond (to 262,208),
# which are trimmed when read.
VOCABULARY = 262_144


class FileNames(NamedTuple):
  """The names of one weight; Hugging Face's without the model's prefix."""

  gguf: str
  huggingface: str


OUTER = {
    'embedding': FileNames('token_embd', 'embed_tokens'),
    'final_norm': FileNames('output_norm', 'norm'),
}

# GGUF names stand behind 'blk.<i>.', Hugging Face ones behind 'layers.<i>.';
# both are followed by '.weight'.
LAYER = {
    'attn_pre_norm': FileNames('attn_norm', 'input_layernorm'),
    'attn_q': FileNames('attn_q', 'self_attn.q_proj'),
    'attn_k': FileNames('attn_k', 'self_attn.k_proj'),
    'attn_v': FileNames('attn_v', 'self_attn.v_proj'),
    'attn_q_norm': FileNames('attn_q_norm', 'self_attn.q_norm'),
    'attn_k_norm': FileNames('attn_k_norm', 'self_attn.k_norm'),
    'attn_o': FileNames('attn_output', 'self_attn.o_proj'),
    'attn_post_norm': FileNames(
        'post_attention_norm', 'post_attention_layernorm'
    ),
    'mlp_pre_norm': FileNames('ffn_norm', 'pre_feedforward_layernorm'),
    'mlp_gate': FileNames('ffn_gate', 'mlp.gate_proj'),
    'mlp_up': FileNames('ffn_up', 'mlp.up_proj'),
    'mlp_down': FileNames('ffn_down', 'mlp.down_proj'),
    'mlp_post_norm': FileNames('post_ffw_norm', 'post_feedforward_layernorm'),
}

# Where the text model's weights live: text-only checkpoints; checkpoints with
# vision as first published; the same as transformers >= 4.52 writes them.
HUGGINGFACE_PREFIXES = (
    'model.', 'language_model.model.', 'model.language_model.'
)
# What stands beside the text model in checkpoints with vision, behind 'model.'
# in some of them.
HUGGINGFACE_VISION = (
    'vision_tower.', 'multi_modal_projector.',
    'model.vision_tower.', 'model.multi_modal_projector.',
)

# The tower: our name -> the whole name in either layout.
VISION_OUTER = {
    'patches/kernel': FileNames(
        'v.patch_embd.weight',
        'vision_tower.vision_model.embeddings.patch_embedding.weight',
    ),
    'patches/bias': FileNames(
        'v.patch_embd.bias',
        'vision_tower.vision_model.embeddings.patch_embedding.bias',
    ),
    'positions': FileNames(
        'v.position_embd.weight',
        'vision_tower.vision_model.embeddings.position_embedding.weight',
    ),
    'post_norm/scale': FileNames(
        'v.post_ln.weight', 'vision_tower.vision_model.post_layernorm.weight'
    ),
    'post_norm/bias': FileNames(
        'v.post_ln.bias', 'vision_tower.vision_model.post_layernorm.bias'
    ),
    'projector/kernel': FileNames(
        'mm.input_projection.weight',
        'multi_modal_projector.mm_input_projection_weight',
    ),
    'projector/norm': FileNames(
        'mm.soft_emb_norm.weight',
        'multi_modal_projector.mm_soft_emb_norm.weight',
    ),
}
# GGUF names stand behind 'v.blk.<i>.', Hugging Face ones behind
# 'vision_tower.vision_model.encoder.layers.<i>.'; both are followed by
# '.weight' or '.bias'.
VISION_LAYER = {
    'norm_1': FileNames('ln1', 'layer_norm1'),
    'norm_2': FileNames('ln2', 'layer_norm2'),
    'attn_q': FileNames('attn_q', 'self_attn.q_proj'),
    'attn_k': FileNames('attn_k', 'self_attn.k_proj'),
    'attn_v': FileNames('attn_v', 'self_attn.v_proj'),
    'attn_o': FileNames('attn_out', 'self_attn.out_proj'),
    'mlp_up': FileNames('ffn_up', 'mlp.fc1'),
    'mlp_down': FileNames('ffn_down', 'mlp.fc2'),
}


def gguf(config: model_config.ModelConfig) -> dict[str, str]:
  """Maps by-layer names to GGUF names, in file order."""
  return {
      name: (f'{n.gguf}.weight' if layer is None
             else f'blk.{layer}.{n.gguf}.weight')
      for name, layer, n in _rows(config)
  }


def huggingface(
    config: model_config.ModelConfig, prefix: str = 'model.'
) -> dict[str, str]:
  """Maps by-layer names to Hugging Face names, in file order."""
  return {
      name: prefix + (f'{n.huggingface}.weight' if layer is None
                      else f'layers.{layer}.{n.huggingface}.weight')
      for name, layer, n in _rows(config)
  }


def vision(config: vision_config.VisionConfig) -> dict[str, FileNames]:
  """Maps the tower's names to those of GGUF and Hugging Face, in file order."""
  found = {}
  for name in vision_config.specs(config):
    if name in VISION_OUTER:
      found[name] = VISION_OUTER[name]
      continue
    layer, kind, part = name.split('/')
    i, n = layer.removeprefix('layer_'), VISION_LAYER[kind]
    end = 'bias' if part == 'bias' else 'weight'
    found[name] = FileNames(
        f'v.blk.{i}.{n.gguf}.{end}',
        f'vision_tower.vision_model.encoder.layers.{i}.{n.huggingface}.{end}',
    )
  return found


def file_shape(spec: weights.WeightSpec) -> tuple[int, ...]:
  """Returns a weight's shape in a file: [rows, row length], or [D]."""
  if is_norm(spec):
    return spec.shape
  rows = spec.shape[: len(spec.shape) - spec.contraction]
  total = 1
  for size in rows:
    total *= size
  return (total, spec.row_length)


def is_norm(spec: weights.WeightSpec) -> bool:
  """Whether a weight is a vector of gains: GGUF stores those as 1 + w."""
  return spec.contraction == 0


def check_shapes(
    source: str,
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
) -> None:
  """Raises a UserError that names the file and the first misfits."""
  specs = lambda shapes: {
      n: weights.WeightSpec(tuple(s), (), 0) for n, s in shapes.items()
  }
  with errors.about(source):
    weights.check(specs(expected), specs(found))


def _rows(config):
  for name in weights.by_layer_specs(config):
    if name in OUTER:
      yield name, None, OUTER[name]
    else:
      layer, _, kind = name.partition('/')
      yield name, int(layer.removeprefix('layer_')), LAYER[kind]
