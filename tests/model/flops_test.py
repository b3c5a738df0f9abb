"""Counted FLOPs are those of the program that a plain step compiles to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat import losses
from gemma_qat.model import attention
from gemma_qat.model import config as model_config
from gemma_qat.model import flops
from gemma_qat.model import transformer
from gemma_qat.model import weights

# Wide enough that products outweigh everything elementwise; three layers of a
# tail, so that nothing is scanned and XLA counts all of it.
WIDE = dataclasses.replace(
    model_config.variant('tiny'), num_layers=3, embed_dim=192, mlp_dim=768,
    head_dim=64, vocab_size=2048, sliding_window=8,
)
BATCH, LENGTH = 2, 32


def _xla_flops(config, train_head):
  """What XLA counts of teacher, student, KL and gradients, all unrolled."""
  model = transformer.Transformer(
      config, dtype=jnp.float32, remat='none', attention='xla'
  )
  tokens = jnp.zeros((BATCH, LENGTH), jnp.int32)
  params = jax.eval_shape(
      lambda key: model.init(key, tokens)['params'], jax.random.key(0)
  )

  def loss(student, teacher):
    logits = []
    for tree in (student, teacher):
      hidden = model.apply({'params': tree}, tokens)
      head = tree['embedding']
      if not train_head:
        head = jax.lax.stop_gradient(head)
      logits.append(transformer.unembed(hidden, head))
    return jnp.mean(losses.kl_from_logits(*logits))

  step = jax.jit(jax.grad(loss))
  return step.lower(params, params).compile().cost_analysis()['flops']


@pytest.mark.parametrize('train_head', [False, True])
def test_a_step_is_what_xla_counts_within_four_percent(train_head):
  counted = flops.train_step(WIDE, BATCH, LENGTH, train_head)
  # XLA computes all pairs and masks some of them afterwards.
  masked = BATCH * (
      WIDE.num_layers * LENGTH**2
      - sum(
          flops.visible_pairs(LENGTH, WIDE.sliding_window)
          for _ in range(WIDE.num_layers)
      )
  )
  masked *= flops.PASSES * 4 * WIDE.num_heads * WIDE.head_dim
  assert counted + masked == pytest.approx(
      _xla_flops(WIDE, train_head), rel=0.04
  )


@pytest.mark.parametrize('length, window', [
    (1, None), (7, None), (7, 3), (7, 7), (7, 20), (64, 16),
])
def test_pairs_are_those_of_the_mask(length, window):
  positions = jnp.arange(length)[None]
  mask = attention.visible(positions, positions, window)
  assert flops.visible_pairs(length, window) == int(np.sum(mask))


@pytest.mark.parametrize('size', ['270m', '1b', '4b', '12b', '27b'])
def test_a_step_takes_eight_flops_a_weight_and_token(size):
  config = model_config.variant(size)
  count = sum(
      int(np.prod(spec.shape)) for spec in weights.tree_specs(config).values()
  )
  eight = 8 * count * 16 * 1024
  trained = flops.train_step(config, 16, 1024, train_head=True)
  scores = flops.PASSES * flops.attention_forward(config, 16, 1024)
  # Gains are no products: less than a thousandth of the weights.
  assert trained - scores == pytest.approx(eight, rel=1e-3)
  assert scores < 0.15 * eight
  frozen = flops.train_step(config, 16, 1024)
  head = 2 * config.vocab_size * config.embed_dim * 16 * 1024
  assert trained - frozen == head


def test_windows_bound_what_long_rows_cost():
  config = model_config.variant('4b')
  short, long = (
      flops.attention_forward(config, 1, n) / n for n in (4096, 8192)
  )
  everywhere = dataclasses.replace(config, pattern=1)
  assert long < 1.4 * short
  assert flops.attention_forward(everywhere, 1, 8192) / 8192 > 1.9 * (
      flops.attention_forward(everywhere, 1, 4096) / 4096
  )
