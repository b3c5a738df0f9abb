"""What the tests of this room share: one teacher, read once."""

import random

import pytest
import small_model

from gemma_qat.training import calibration


@pytest.fixture(scope='session')
def params():
  return small_model.make_params()


@pytest.fixture(scope='session')
def grams(params):
  return calibration.gather_grams(
      small_model.make_model(), params, [small_model.BATCH['tokens']]
  )


@pytest.fixture(scope='session')
def student(params):
  """Codes and scales by the formats' own rules."""
  return small_model.init_student(params, small_model.PLAN)


@pytest.fixture(scope='session')
def text(tmp_path_factory):
  """Folder of small documents, some to train on, some to evaluate with."""
  folder = tmp_path_factory.mktemp('text')
  rng = random.Random(0)
  word = lambda: ''.join(rng.choices('etaoinshr', k=rng.randint(2, 7)))
  words = [word() for _ in range(300)]
  for i in range(50):
    kind = 'train' if i < 40 else 'held'
    document = ' '.join(rng.choices(words, k=200))
    (folder / f'{kind}{i}.txt').write_text(document, encoding='utf-8')
  return folder
