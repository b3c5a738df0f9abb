"""A config that cannot work is refused before anything is computed."""

import jax
import jax.numpy as jnp
import pytest

from experiments.configs import base
from gemma_qat import errors
from gemma_qat import losses
from gemma_qat.model import config as model_config
from gemma_qat.model import transformer
from gemma_qat.training import machine
from gemma_qat.training import settings


def _config(**changes):
  """The tiny base config with changes like train__steps=3."""
  config = base.get_config('tiny').unlock()
  for key, value in changes.items():
    section, field = key.split('__')
    config[section][field] = value
  return config.lock()


@pytest.mark.parametrize('read, changes, message', [
    (settings.quant, {'quant__rules': ((r'.', 'q3'),)}, "format 'q3'.*q4_0"),
    (settings.quant, {'quant__modes': ((r'.', 'frozen'),)},
     "quant.modes: Unknown mode 'frozen': choose one of derived, learned"),
    (settings.quant, {'quant__start': 'awq'}, "quant.start: 'awq'.*gptq"),
    (settings.quant, {'quant__calibration_tokens': 0},
     'calibration_tokens=0 is below 1'),
    (settings.quant, {'quant__error_propagation': 1.5},
     'quant.error_propagation=1.5 is no share'),
    (settings.quant, {'quant__bf16_safe_scales': True,
                      'quant__rules': ((r'.', 'q8_0'),)},
     'bf16_safe_scales restricts the scales of q4_0'),
    (settings.train, {'train__steps': 0}, 'train.steps=0 is below 1'),
    (settings.train, {'train__log_every': 0}, 'train.log_every=0 is below 1'),
    (settings.train, {'train__rules': ((r'.', 'biases'),)},
     "group 'biases'.*multipliers"),
    (settings.train, {'train__accumulate': 3},
     'accumulate=3 does not divide config.train.batch_size=8'),
    (settings.optimizer, {'optimizer__name': 'sgd'}, "name: 'sgd'.*adafactor"),
    (settings.optimizer, {'optimizer__moments': 'int4'},
     "moments: 'int4' is not one of float32, bfloat16, int8"),
    (settings.optimizer, {'optimizer__name': 'adafactor',
                          'optimizer__moments': 'int8'},
     'moments=int8 is for adam: adafactor keeps sums'),
    (settings.optimizer, {'optimizer__moments': 'int8', 'optimizer__b1': 0.98},
     'int8 needs b1.2 < b2, not b1=0.98 and b2=0.95'),
    (settings.optimizer, {'optimizer__warmup_steps': 8},
     'warmup_steps=8 .*steps=8'),
    (settings.compute, {'compute__dtype': 'float16'}, "dtype: 'float16'"),
    (settings.compute, {'compute__residual_dtype': 'int8'}, 'residual_dtype'),
    (settings.compute, {'compute__attention': 'flash'}, "attention: 'flash'"),
    (settings.compute, {'compute__attention': 'cudnn'},
     "'cudnn' does not compute in float32: set config.compute.dtype"),
    (settings.compute, {'compute__remat': 'some'}, "policy 'some'"),
])
def test_a_value_that_cannot_work_is_named(read, changes, message):
  with pytest.raises(errors.UserError, match=message):
    read(_config(**changes))


def test_auto_is_resolved_for_this_machine():
  s = settings.compute(
      _config(compute__dtype='auto', compute__attention='auto')
  )
  assert s.dtype == machine.fast_dtype()
  config = model_config.variant('tiny')
  model = machine.make_model(config, s, transformer.identity)
  assert model.attention == machine.fast_attention(config, s.dtype)


def test_a_known_gpu_has_more_room_for_the_kl():
  # What the vocabulary's exponentials of 4,096 tokens take, twice in bfloat16.
  wanted = 4096 * 262_144 * 2 * 2
  assert machine.kl_room('gpu', 'NVIDIA H100 80GB HBM3') >= wanted > losses.ROOM
  for platform, kind in (
      ('gpu', 'NVIDIA GeForce RTX 3090'), ('gpu', 'unheard of'),
      ('tpu', 'TPU v5'), ('cpu', 'cpu'),
  ):
    assert machine.kl_room(platform, kind) == losses.ROOM


@pytest.mark.skipif(jax.default_backend() == 'gpu', reason='needs no GPU')
def test_auto_attention_is_blockwise_on_several_devices():
  assert jax.device_count() == 8
  config = model_config.variant('270m')
  assert machine.fast_attention(config, 'float32') == 'blockwise'


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs a GPU')
def test_auto_attention_on_a_gpu_is_cudnn_or_says_why_not(capsys):
  machine.fast_attention.cache_clear()
  config = model_config.variant('270m')
  found = machine.fast_attention(config, 'bfloat16')
  lines = capsys.readouterr().err.splitlines()
  assert (found, len(lines)) in [('cudnn', 0), ('blockwise', 1)]
  # cuDNN's kernel knows no float32.
  assert machine.fast_attention(config, 'float32') == 'blockwise'
  assert 'cuDNN does not serve it' in capsys.readouterr().err


def test_the_model_is_what_the_settings_say():
  s = settings.compute(_config(
      compute__dtype='bfloat16', compute__remat='products',
      compute__attention='xla', compute__round_embedding_multiplier=True,
  ))
  config = model_config.variant('tiny')
  assert machine.make_model(config, s, transformer.identity) == (
      transformer.Transformer(
          config, transformer.identity, dtype=jnp.dtype('bfloat16'),
          residual_dtype=jnp.dtype('float32'), remat='products',
          attention='xla', round_embedding_multiplier=True,
      )
  )
