"""Every weight has one name in every layout."""

import gguf
import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import names
from gemma_qat.model import config as model_config
from gemma_qat.model import weights as model_weights


@pytest.mark.parametrize('variant', list(model_config.VARIANTS))
def test_names_cover_all_weights_and_are_unique(variant):
  config = model_config.variant(variant)
  specs = model_weights.by_layer_specs(config)
  for table in (names.gguf(config), names.huggingface(config)):
    assert list(table) == list(specs)
    assert len(set(table.values())) == len(specs)


def test_names_are_those_of_the_gguf_library():
  """Its own map leads from Hugging Face names to GGUF names."""
  config = model_config.variant('27b')
  known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_layers)
  table = names.gguf(config)
  for name, huggingface in names.huggingface(config).items():
    if huggingface.endswith('embed_tokens.weight'):
      continue
    mapped = known.get_name(huggingface, try_suffixes=('.weight',))
    assert mapped == table[name], huggingface


def test_norms_are_the_vectors():
  specs = model_weights.by_layer_specs(model_config.variant('tiny'))
  norms = {n.split('/')[-1] for n, s in specs.items() if names.is_norm(s)}
  assert norms == {
      'final_norm', 'attn_pre_norm', 'attn_post_norm', 'mlp_pre_norm',
      'mlp_post_norm', 'attn_q_norm', 'attn_k_norm',
  }


def test_misfits_name_source_and_tensor():
  with pytest.raises(errors.UserError, match='here.*b has shape'):
    names.check_shapes('here', {'a': (1,), 'b': (2, 3)},
                       {'a': (1,), 'b': (3, 2)})
