"""The network is a function of tokens, weights and the intercept alone."""

import dataclasses
import zlib

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.model import config as model_config
from gemma_qat.model import transformer
from gemma_qat.model import weights

# Two groups of a local and a global layer, and a local one behind: all that
# the structure knows, in a third of tiny's compilation time.
SMALL = dataclasses.replace(
    model_config.variant('tiny'), num_layers=5, pattern=2, vocab_size=128
)
# Longer than the window of 16.
TOKENS = np.random.default_rng(0).integers(3, 128, (2, 24), np.int32)


def _draw(name, spec):
  draw = np.random.default_rng(zlib.crc32(name.encode()))
  spread = spec.row_length**-0.5 if spec.contraction else 0.1
  return spread * draw.standard_normal(spec.shape, np.float32)


@pytest.fixture(scope='module')
def params():
  return weights.stack(SMALL, {
      name: _draw(name, spec)
      for name, spec in weights.by_layer_specs(SMALL).items()
  })


def _model(intercept=transformer.identity, config=SMALL, **settings):
  settings = dict(dtype=jnp.float32, remat='none') | settings
  return transformer.Transformer(config, intercept, **settings)


def _jitted(*args, **settings):
  model = _model(*args, **settings)
  return jax.jit(lambda params, tokens: model.apply({'params': params}, tokens))


def _hidden(params, *args, **settings):
  return np.asarray(_jitted(*args, **settings)(params, TOKENS))


@pytest.fixture(scope='module')
def run():
  """The plain network, compiled once: run(params, tokens)."""
  return _jitted()


@pytest.fixture(scope='module')
def hidden(run, params):
  return np.asarray(run(params, TOKENS))


def _changed(params, path, change):
  flat = traverse_util.flatten_dict(params, sep='/')
  flat[path] = change(flat[path])
  return traverse_util.unflatten_dict(flat, sep='/')


def test_init_makes_the_declared_tree():
  shapes = jax.eval_shape(_model().init, jax.random.key(0), TOKENS)['params']
  assert {
      path: leaf.shape
      for path, leaf in traverse_util.flatten_dict(shapes, sep='/').items()
  } == {path: s.shape for path, s in weights.tree_specs(SMALL).items()}


def test_no_position_sees_a_later_token(run, params, hidden):
  tokens = TOKENS.copy()
  tokens[0, 12] += 1
  other = np.asarray(run(params, tokens))
  np.testing.assert_array_equal(other[0, :12], hidden[0, :12])
  np.testing.assert_array_equal(other[1], hidden[1])
  assert (np.abs(other[0, 12:] - hidden[0, 12:]).max(axis=-1) > 1e-4).all()


def test_generation_with_a_cache_computes_the_same_hidden_states(
    params, hidden
):
  model = _model()

  @jax.jit
  def read(params, tokens, start, cache):
    positions = start + jnp.broadcast_to(
        jnp.arange(tokens.shape[1]), tokens.shape
    )
    return model.apply({'params': params}, tokens, positions, cache)

  cache = transformer.init_cache(SMALL, batch=2, length=30)
  first, cache = read(params, TOKENS[:, :10], 0, cache)
  parts = [first]
  for i in range(10, 24):
    step, cache = read(params, TOKENS[:, i : i + 1], i, cache)
    parts.append(step)
  np.testing.assert_allclose(
      np.concatenate(parts, axis=1), hidden, rtol=1e-4, atol=1e-5
  )


def test_the_default_intercept_changes_nothing(params, hidden):
  np.testing.assert_array_equal(
      _hidden(params, lambda path, leaf: leaf), hidden
  )


@pytest.mark.parametrize(
    'path', ['embedding', 'groups/layer_1/attn_o', 'tail/layer_0/attn_k_norm']
)
def test_an_intercept_stands_in_for_the_weight_it_changes(
    run, params, hidden, path
):
  # Not a factor: the norm behind a product would take it out again.
  intercepted = _hidden(params, lambda p, x: abs(x) if p == path else x)
  assert np.abs(intercepted - hidden).max() > 1e-3
  np.testing.assert_allclose(
      intercepted, run(_changed(params, path, abs), TOKENS),
      rtol=1e-4, atol=1e-5,
  )


def test_an_intercept_sees_each_weight_one_layer_at_a_time(params):
  seen = {}

  def look(path, leaf):
    assert seen.setdefault(path, leaf.shape) == leaf.shape
    return leaf

  model = _model(look)
  jax.eval_shape(lambda p: model.apply({'params': p}, TOKENS), params)
  # Of the embedding the rows of the tokens, not the whole vocabulary.
  assert seen.pop('embedding') == (*TOKENS.shape, SMALL.embed_dim)
  assert seen == {
      path: s.shape[1:] if s.axes[0] == 'layers' else s.shape
      for path, s in weights.tree_specs(SMALL).items() if path != 'embedding'
  }


def test_intercepts_of_one_process_do_not_leak_into_each_other(params, hidden):
  half = lambda path, x: x.astype(jnp.bfloat16).astype(jnp.float32)
  gains = lambda path, x: x * 0.5 if x.ndim == 1 else x
  first, second = _hidden(params, half), _hidden(params, gains)
  assert np.abs(first - second).max() > 1e-3
  np.testing.assert_array_equal(_hidden(params, half), first)
  assert np.abs(first - hidden).max() > 1e-3


def test_remat_policies_and_attentions_give_equal_gradients(params):
  params = {k: x for k, x in params.items() if k != 'tail'}
  target = np.random.default_rng(1).standard_normal((2, 24, SMALL.embed_dim))

  def gradient(**settings):
    model = _model(config=dataclasses.replace(SMALL, num_layers=4), **settings)
    def loss(params):
      out = model.apply({'params': params}, TOKENS)
      return jnp.mean(out * target.astype(np.float32))
    gradient = jax.device_get(jax.jit(jax.grad(loss))(params))
    return traverse_util.flatten_dict(gradient, sep='/')

  expected = gradient(remat='none', attention='xla')
  for remat, attention in [('full', 'xla'), ('products', 'mapped')]:
    found = gradient(remat=remat, attention=attention)
    for path, x in expected.items():
      error = np.abs(found[path] - x).max() / np.abs(x).max()
      assert error < 1e-4, (remat, attention, path)


def test_bfloat16_products_stay_near_float32(params, hidden):
  # Measured: 0.02 of hidden states of size 1.
  error = _hidden(params, dtype=jnp.bfloat16) - hidden
  assert 1e-4 < np.sqrt(np.mean(error**2)) < 0.05


def test_the_multiplier_of_the_embedding_is_rounded_when_asked(params):
  # sqrt(96) = 9.798 becomes 9.8125 in bfloat16; tiny's 8 is exact.
  config = dataclasses.replace(SMALL, embed_dim=96, num_layers=2)
  params = weights.stack(config, {
      name: _draw(name, spec)
      for name, spec in weights.by_layer_specs(config).items()
  })
  rounded = _hidden(params, config=config, round_embedding_multiplier=True)
  exact = _jitted(config=config)
  ratio = np.float32(9.8125 / 96**0.5)
  scaled = exact(_changed(params, 'embedding', lambda x: x * ratio), TOKENS)
  np.testing.assert_allclose(rounded, scaled, rtol=1e-4, atol=1e-5)
  assert np.abs(rounded - exact(params, TOKENS)).max() > 1e-4


def test_unembed_multiplies_with_the_table():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 3, 8), np.float32)
  table = rng.standard_normal((16, 8), np.float32)
  np.testing.assert_allclose(
      transformer.unembed(x, table), x @ table.T, rtol=1e-5, atol=1e-5
  )


def test_a_missing_weight_is_named(params):
  tree = _changed(params, 'tail/layer_0/mlp_up', lambda x: x)
  del tree['tail']['layer_0']['mlp_up']
  with pytest.raises(errors.UserError, match='tail/layer_0/mlp_up is missing'):
    jax.eval_shape(lambda p: _model().apply({'params': p}, TOKENS), tree)


def test_an_unknown_remat_policy_is_refused_with_the_known_ones():
  with pytest.raises(errors.UserError, match="'some'.*full, products, none"):
    transformer.remat_policy('some')
