"""What the tests of this room share: one teacher, read once."""

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
