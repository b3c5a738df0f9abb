"""A card is understood as people write it."""

import pytest

from gemma_qat import errors
from gemma_qat.reporting import gpus


@pytest.mark.parametrize('text, gib', [
    ('24GB', 24), ('24 GiB', 24), ('24', 24), ('7.5g', 7.5), ('8192MiB', 8),
    ('RTX 3090', 24), ('rtx-3090', 24), ('NVIDIA GeForce RTX 3090', 24),
    ('RTX 4060 Laptop', 8), ('NVIDIA GeForce RTX 4060 Laptop GPU', 8),
    ('H100', 79.6), ('A100 80GB', 80), ('radeon rx 7900 xtx', 24),
])
def test_sizes_and_names(text, gib):
  assert gpus.parse(text).num_bytes == round(gib * 2**30)


@pytest.mark.parametrize('text', ['', 'many', '0GB', '-8GB', '24TB', 'RTX'])
def test_anything_else_is_refused(text):
  with pytest.raises(errors.UserError, match=f'--gpu={text} is neither'):
    gpus.parse(text)


def test_a_name_of_several_cards_lists_them():
  with pytest.raises(errors.UserError, match='A100 40GB, A100 80GB'):
    gpus.parse('A100')


@pytest.mark.parametrize('name', gpus.CARDS)
def test_every_listed_name_means_itself(name):
  assert gpus.parse(name).name == name


def test_smallest_card_is_the_first_that_holds_it():
  assert gpus.smallest(0) == 4
  assert gpus.smallest(24 * 2**30) == 24
  assert gpus.smallest(24 * 2**30 + 1) == 32
  assert gpus.smallest(80 * 2**30 + 1) is None
