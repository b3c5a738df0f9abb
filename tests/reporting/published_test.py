"""The arithmetic gives the published figures, where it says so."""

import pytest

from gemma_qat.model import config as model_config
from gemma_qat.reporting import published


@pytest.mark.parametrize('name', published.RECIPES)
def test_every_published_figure_is_reproduced(name):
  recipe = published.RECIPES[name]
  assert set(recipe.figures) == set(published.SIZES)
  for size, figure in recipe.figures.items():
    assert recipe.compute(size) == pytest.approx(
        figure, abs=recipe.tolerance + 1e-9
    ), size
  assert recipe.tolerance <= 0.06


def test_blocks_of_32_do_not_fit_in_units_of_10_to_the_9():
  recipe = published.RECIPES['blocks']
  assert recipe.compute('27b') * 2**30 / 1e9 > recipe.figures['27b'] + 1


def test_neither_one_sequence_nor_full_local_layers_give_the_cache():
  recipe = published.RECIPES['kv']
  for size, figure in recipe.figures.items():
    assert 11 < figure / (recipe.compute(size) / 12) < 13, size
  for size, as_said in (
      ('1b', 0.9), ('4b', 4.6), ('12b', 12.9), ('27b', 16.6)
  ):
    c = model_config.variant(size)
    values = 2 * c.num_layers * c.num_kv_heads * c.head_dim
    assert round(2 * values * published.KV_CONTEXT / 1e9, 1) == as_said
  assert recipe.figures['12b'] > 14 and recipe.figures['27b'] > 18
