"""The tree and the by-layer view hold the same weights."""

from flax import traverse_util
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.model import config as model_config
from gemma_qat.model import weights

TINY = model_config.variant('tiny')


def _numbered(config=TINY):
  """Arrays that can all be told apart, cheap to make."""
  return {
      name: np.broadcast_to(np.float32(i), spec.shape)
      for i, (name, spec) in enumerate(weights.by_layer_specs(config).items())
  }


def test_unstack_undoes_stack():
  flat = _numbered()
  back = weights.unstack(TINY, weights.stack(TINY, flat))
  assert list(back) == list(flat)
  for name, array in flat.items():
    np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize('name', ['tiny', '270m'])
def test_stack_makes_what_tree_specs_declares(name):
  config = model_config.variant(name)
  # Zero strides: the sizes are real, the memory is not.
  flat = {
      name: np.broadcast_to(np.int8(0), spec.shape)
      for name, spec in weights.by_layer_specs(config).items()
  }
  tree = traverse_util.flatten_dict(weights.stack(config, flat), sep='/')
  specs = weights.tree_specs(config)
  assert {p: x.shape for p, x in tree.items()} == {
      p: s.shape for p, s in specs.items()
  }
  assert all(len(s.shape) == len(s.axes) for s in specs.values())


def test_unstack_keeps_the_parts_of_nodes():
  tree = weights.stack(TINY, _numbered())
  query = tree['groups']['layer_1'].pop('attn_q')
  tree['groups']['layer_1']['attn_q'] = {
      'codes': query, 'scale': query[..., :2]
  }
  flat = weights.unstack(TINY, tree)
  expected = _numbered()['layer_1/attn_q']
  np.testing.assert_array_equal(flat['layer_1/attn_q/codes'], expected)
  np.testing.assert_array_equal(
      flat['layer_1/attn_q/scale'], expected[..., :2]
  )
  assert 'layer_1/attn_q' not in flat


def test_a_missing_weight_is_named():
  flat = _numbered()
  del flat['layer_3/mlp_up']
  with pytest.raises(errors.UserError, match='missing.*layer_3/mlp_up'):
    weights.stack(TINY, flat)


def test_an_unknown_weight_is_named():
  flat = _numbered() | {'layer_8/attn_q': np.zeros((4, 32, 64))}
  with pytest.raises(errors.UserError, match='unknown.*layer_8/attn_q'):
    weights.stack(TINY, flat)


def test_a_misshapen_weight_is_named_with_both_shapes():
  flat = _numbered() | {'layer_2/attn_o': np.zeros((64, 128))}
  with pytest.raises(
      errors.UserError,
      match=r'layer_2/attn_o has shape \(64, 128\), expected \(64, 4, 32\)',
  ):
    weights.stack(TINY, flat)


def test_row_length_is_the_product_of_the_contracted_axes():
  specs = weights.by_layer_specs(TINY)
  assert specs['layer_0/attn_q'].row_length == TINY.embed_dim
  assert specs['layer_0/attn_o'].row_length == TINY.num_heads * TINY.head_dim
  assert specs['layer_0/mlp_down'].row_length == TINY.mlp_dim


@pytest.mark.parametrize('name, millions', [
    ('270m', 268), ('1b', 1000), ('4b', 3880), ('12b', 11_766), ('27b', 27_009)
])
def test_variants_have_their_published_number_of_weights(name, millions):
  # Source: the sizes of the public text checkpoints, in millions.
  specs = weights.by_layer_specs(model_config.variant(name))
  count = sum(int(np.prod(s.shape, dtype=np.int64)) for s in specs.values())
  assert count / 1e6 == pytest.approx(millions, rel=1e-3)


def test_every_matrix_of_every_variant_holds_whole_blocks():
  for config in model_config.VARIANTS.values():
    for name, spec in weights.by_layer_specs(config).items():
      if spec.contraction:
        assert spec.shape[-1] % 32 == 0, (config.variant, name)
