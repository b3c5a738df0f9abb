import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.quant import rules

_PATHS = ['embedding', 'layer_0/attn_q', 'layer_0/mlp_up', 'layer_10/attn_q']


def test_the_first_rule_wins():
  resolved = rules.resolve(
      [('embed', 'q8_0'), (r'layer_0/', 'int4'), ('.', 'q4_0')], _PATHS
  )
  assert resolved == {
      'embedding': 'q8_0',
      'layer_0/attn_q': 'int4',
      'layer_0/mlp_up': 'int4',
      'layer_10/attn_q': 'q4_0',
  }


def test_paths_of_no_rule_or_of_none_are_absent():
  resolved = rules.resolve([('mlp', None), ('layer_0', 1)], _PATHS)
  assert resolved == {'layer_0/attn_q': 1}


def test_a_rule_hidden_by_earlier_ones_is_no_error():
  assert rules.resolve([('.', 1), ('attn_q$', 2)], _PATHS) == dict.fromkeys(
      _PATHS, 1
  )


def test_a_rule_that_fits_nothing_is_named_with_some_weights():
  with pytest.raises(errors.UserError, match='attn_z.*embedding, layer_0'):
    rules.resolve([('.', 1), ('attn_z', 2)], _PATHS)


def test_a_broken_regex_is_named():
  with pytest.raises(errors.UserError, match=r"'\(layer' is no regular"):
    rules.resolve([('(layer', 1)], _PATHS)


def test_values_that_are_not_finite_are_counted_under_their_name():
  array = np.zeros((3, 4), np.float32)
  rules.check_finite('layer_3/attn_v', array)
  array[0, 1], array[2, 2] = np.nan, -np.inf
  with pytest.raises(errors.UserError, match='layer_3/attn_v holds 2 .*of 12'):
    rules.check_finite('layer_3/attn_v', array)
