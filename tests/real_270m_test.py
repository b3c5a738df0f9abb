"""The real 270M once, end to end: load, two steps, export, llama.cpp agrees."""

import os
import pydoc_data.topics
import subprocess
import sys

import pytest

from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import export
from gemma_qat.commands import evaluate

_CONFIG = 'experiments/configs/gemma3_270m_cpu.py'


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp('text')
  topics = [t for _, t in sorted(pydoc_data.topics.topics.items())]
  for i, topic in enumerate(topics[:12]):
    (folder / f'train{i}.txt').write_text(topic, encoding='utf-8')
  (folder / 'test.txt').write_text('\n\n'.join(topics[12:24]), encoding='utf-8')
  return folder


def test_two_steps_of_the_270m_reach_llama_cpp(text, tmp_path):
  # A process of its own, as a user's: with one device, not this one's eight.
  subprocess.run(
      [
          sys.executable, '-m', 'gemma_qat', 'train', f'--config={_CONFIG}',
          f'--workdir={tmp_path}',
          f'--config.data.train=files:{text}/train*.txt',
          '--config.data.heldout_fraction=0.3',
          f'--config.evaluation.text=files:{text}/test.txt',
          '--config.quant.start=reference',
          '--config.train.steps=2', '--config.train.batch_size=1',
          '--config.train.length=64', '--config.train.heldout_batches=1',
          '--config.train.checkpoint_every=2',
          '--config.train.evaluate_every=2',
          '--config.optimizer.warmup_steps=1',
      ],
      env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
      check=True,
  )
  files = {'base': tmp_path / 'base.gguf', 'qat': tmp_path / 'qat.gguf'}
  export.save_float(detect.load('gemma3-270m'), files['base'], 'f16')
  export.export(detect.load(tmp_path), files['qat'])
  words = (text / 'test.txt').read_text(encoding='utf-8')
  _, by_llama = evaluate.evaluate(files, words, 256, 2, 'base')
  _, by_jax = evaluate.evaluate(files, words, 256, 2, 'base', engine='jax')
  # The dequantized checkpoint: no rounding of the format between the two.
  assert by_llama['base'].ppl == pytest.approx(by_jax['base'].ppl, rel=0.005)
  assert by_llama['qat'].ppl == pytest.approx(by_jax['qat'].ppl, rel=0.01)
  assert by_llama['qat'].kld == pytest.approx(by_jax['qat'].kld, rel=0.05)
  assert 0 < by_llama['qat'].kld < 2
