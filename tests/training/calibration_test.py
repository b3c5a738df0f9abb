"""Calibration sums what the matrices of the network read."""

import numpy as np
import pytest
import small_model

from gemma_qat.model import weights
from gemma_qat.training import calibration


def test_every_matrix_of_every_layer_has_a_gram_of_its_inputs(grams):
  specs = weights.tree_specs(small_model.CONFIG)
  expected = {}
  for path, spec in specs.items():
    if spec.contraction:
      stack = spec.shape[:1] if spec.axes[0] == 'layers' else ()
      expected[path] = (*stack, spec.row_length, spec.row_length)
  assert {path: gram.shape for path, gram in grams.items()} == expected
  for path, gram in grams.items():
    np.testing.assert_allclose(
        gram, np.swapaxes(gram, -1, -2), rtol=1e-4, atol=1e-5, err_msg=path
    )
    assert np.linalg.eigvalsh(gram).min() > -1e-4, path


def test_the_first_layer_reads_the_normalised_embedding(params, grams):
  c = small_model.CONFIG
  tokens = small_model.BATCH['tokens'].ravel()
  rows = params['embedding'][tokens].astype(np.float64) * c.embed_dim**0.5
  rows /= np.sqrt(np.mean(rows**2, axis=-1, keepdims=True) + c.norm_epsilon)
  rows *= 1 + params['groups']['layer_0']['attn_pre_norm'][0]
  expected = rows.T @ rows / len(tokens)
  for name in ('attn_q', 'attn_k', 'attn_v'):
    np.testing.assert_allclose(
        grams[f'groups/layer_0/{name}'][0], expected, rtol=1e-3, atol=1e-4
    )


def test_batches_are_averaged_by_token(params, grams):
  tokens, heard = small_model.BATCH['tokens'], []
  halves = calibration.gather_grams(
      small_model.make_model(), params, [tokens[:4], tokens[4:]],
      on_batch=heard.append,
  )
  assert heard == [80, 80]
  for path, gram in grams.items():
    np.testing.assert_allclose(halves[path], gram, rtol=1e-3, atol=1e-5)


def test_no_text_is_an_error(params):
  with pytest.raises(ValueError, match='No batch'):
    calibration.gather_grams(small_model.make_model(), params, [])
