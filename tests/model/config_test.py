"""The sizes of each variant are consistent."""

import dataclasses

import pytest

from gemma_qat import errors
from gemma_qat.model import config as model_config


def test_an_unknown_variant_is_refused_with_the_known_ones():
  with pytest.raises(errors.UserError, match="'2b'.*tiny, 270m, 1b"):
    model_config.variant('2b')


def test_heads_that_cannot_share_are_refused():
  with pytest.raises(errors.UserError, match='4 query heads .* 3 key/value'):
    dataclasses.replace(model_config.variant('tiny'), num_kv_heads=3)


@pytest.mark.parametrize('name', model_config.VARIANTS)
def test_a_variant_is_recognised_by_its_sizes(name):
  renamed = dataclasses.replace(model_config.variant(name), variant='custom')
  assert model_config.find_variant(renamed) == name


def test_other_sizes_are_no_variant():
  other = dataclasses.replace(model_config.variant('tiny'), mlp_dim=96)
  assert model_config.find_variant(other) == 'custom'


@pytest.mark.parametrize('name', model_config.VARIANTS)
def test_every_sixth_layer_is_global_and_the_tail_is_local(name):
  config = model_config.variant(name)
  kinds = [config.is_global(i) for i in range(config.num_layers)]
  assert sum(kinds) == config.num_groups
  assert not any(kinds[config.num_layers - config.num_tail_layers :])
  assert all(kinds[5::6])


def test_only_27b_scales_queries_by_something_else_than_the_head_width():
  for config in model_config.VARIANTS.values():
    is_head_width = config.query_scale_dim == config.head_dim
    assert is_head_width == (config.variant != '27b')
  assert model_config.variant('27b').query_scale == pytest.approx(168**-0.5)
