"""Many texts at once are the texts that come one by one."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import sharding
from gemma_qat.model import batch_sampling
from gemma_qat.model import config as model_config
from gemma_qat.model import sampling
from gemma_qat.model import transformer
from gemma_qat.model import weights

# A local and a global layer; the window of 16 is shorter than the texts.
SMALL = dataclasses.replace(
    model_config.variant('tiny'), num_layers=2, pattern=2, vocab_size=128
)
LENGTH = 30
RULES = batch_sampling.Rules(
    length=LENGTH, stop_ids=(), forbidden=(0, 2), vocabulary=120
)


@pytest.fixture(scope='module')
def params():
  def draw(name, spec):
    numbers = np.random.default_rng(zlib.crc32(name.encode()))
    spread = spec.row_length**-0.5 if spec.contraction else 0.1
    return spread * numbers.standard_normal(spec.shape, np.float32)

  specs = weights.by_layer_specs(SMALL)
  flat = {name: draw(name, spec) for name, spec in specs.items()}
  return jax.tree.map(jnp.asarray, weights.stack(SMALL, flat))


def _sampler(devices=1, **changes):
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  model = transformer.Transformer(
      SMALL, constrain=sharding.make_constrain(mesh), dtype=jnp.float32,
      remat='none',
  )
  sample = batch_sampling.make_sampler(
      model, dataclasses.replace(RULES, **changes), mesh
  )
  return lambda params, *rest: sample(
      jax.device_put(params, sharding.replicated(mesh)), *rest
  )


def _keys(count):
  return jax.random.split(jax.random.key(0), count)


def _prompts(*lengths):
  numbers = np.random.default_rng(0)
  return [[2, *numbers.integers(9, 120, n - 1).tolist()] for n in lengths]


@pytest.fixture(scope='module')
def sample():
  return _sampler()


@pytest.fixture(scope='module')
def drawn(sample, params):
  """Eight texts from BOS alone, over all allowed tokens."""
  return sample(params, [[2]] * 8, _keys(8))


def test_prompts_of_any_length_go_on_as_they_do_alone(params):
  sample = _sampler(temperature=0.0, forbidden=(), vocabulary=128)
  model = transformer.Transformer(SMALL, dtype=jnp.float32, remat='none')
  logits = jax.jit(lambda tokens: transformer.unembed(
      model.apply({'params': params}, tokens), params['embedding']
  ))
  for lengths in (6, 17, 9, 20), (1, 3, 29, 2):
    prompts = _prompts(*lengths)
    texts = sample(params, prompts, _keys(4))
    likeliest = np.asarray(jnp.argmax(logits(np.stack(texts)), axis=-1))
    for prompt, text, best in zip(prompts, texts, likeliest, strict=True):
      n = len(prompt)
      assert text[:n].tolist() == prompt
      np.testing.assert_array_equal(text[n:], best[n - 1 : -1])
  # The last of them by the sampler of one text.
  alone = sampling.generate(model, params, prompts[1], LENGTH - 3)
  assert texts[1].tolist() == [*prompts[1], *alone]


def test_texts_do_not_depend_on_their_neighbours(sample, params, drawn):
  order = np.array([5, 1, 0, 3, 2, 7, 4, 6])
  again = sample(params, [[2]] * 8, _keys(8)[order])
  for i, text in zip(order, again):
    np.testing.assert_array_equal(text, drawn[i])
  assert len({t.tobytes() for t in drawn}) == 8


def test_a_batch_over_eight_devices_is_the_same(params, drawn):
  spread = _sampler(devices=8)(params, [[2]] * 8, _keys(8))
  for one, other in zip(drawn, spread, strict=True):
    np.testing.assert_array_equal(one, other)


def test_forbidden_tokens_and_padding_of_the_vocabulary_are_not_drawn(drawn):
  tokens = np.concatenate([text[1:] for text in drawn])
  assert len(tokens) == 8 * (LENGTH - 1)
  assert not np.isin(tokens, [0, 2]).any() and tokens.max() < 120


def test_a_text_ends_with_the_first_stop(params, drawn):
  # The tokens that some text draws early become stops.
  stops = tuple({int(drawn[0][4]), int(drawn[1][9])})
  ended = _sampler(stop_ids=stops)(params, [[2]] * 8, _keys(8))
  for whole, text in zip(drawn, ended, strict=True):
    places = np.flatnonzero(np.isin(whole[1:], stops))
    end = 2 + places[0] if len(places) else LENGTH
    np.testing.assert_array_equal(text, whole[:end])
  assert len(ended[0]) <= 5


def test_the_first_turn_is_followed_by_the_bridge_and_the_second_ends(params):
  # Many tokens end a turn, so that most texts have two.
  turn = 50
  rules = dict(stop_ids=(turn, 51), turn_id=turn, bridge=(100, 101, 102))
  few = dict(forbidden=tuple({*range(120)} - {50, 51, 60, 61, 62, 63}))
  texts = _sampler(**rules, **few)(params, [[2, 9]] * 16, _keys(16))
  seen = set()
  for text in map(np.ndarray.tolist, texts):
    turns = [i for i, t in enumerate(text) if t == turn]
    if turns:
      bridge = text[turns[0] + 1 : turns[0] + 4]
      assert bridge == [100, 101, 102][: len(bridge)]
    if 51 in text:
      assert text.index(51) == len(text) - 1
    if len(turns) == 2:
      assert turns[1] == len(text) - 1
    seen.add((len(turns), 51 in text))
  assert (2, False) in seen and {(0, True), (1, True)} & seen


def test_work_ends_when_all_have_ended_and_when_asked_to(params):
  calls = []
  only_stop = dict(stop_ids=(5,), forbidden=tuple({*range(120)} - {5}))
  sample = _sampler(**only_stop, length=100)
  texts = sample(params, [[2]] * 2, _keys(2), lambda: calls.append(1))
  assert [t.tolist() for t in texts] == [[2, 5]] * 2 and len(calls) == 1

  def stop():
    raise InterruptedError
  with pytest.raises(InterruptedError):
    sample(params, [[2]] * 2, _keys(2), stop)


def test_the_cache_is_counted():
  # 2 layers, keys and values, 2 bytes.
  c = SMALL
  per_token = 2 * 2 * c.num_kv_heads * c.head_dim * 2
  assert batch_sampling.cache_bytes(c, 3, 10, jnp.bfloat16) == 30 * per_token
