"""One small finished run, and text that needs no reading of packages."""

import json
import pydoc_data.topics

import pytest

from gemma_qat.commands import config_flags
from gemma_qat.commands import run

CONFIG = 'experiments/configs/gemma3_270m_cpu.py'


@pytest.fixture(scope='session')
def texts(tmp_path_factory):
  """Flags that train and evaluate on two small files."""
  folder = tmp_path_factory.mktemp('texts')
  topics = [t for _, t in sorted(pydoc_data.topics.topics.items())]
  for name, some in (('train', topics[0:40:2]), ('test', topics[1:40:2])):
    lines = [json.dumps({'text': t[:4_000]}) + '\n' for t in some]
    (folder / f'{name}.jsonl').write_text(''.join(lines), encoding='utf-8')
  return [
      f'--config.data.train=jsonl:{folder}/train.jsonl',
      f'--config.evaluation.text=jsonl:{folder}/test.jsonl',
      '--config.data.heldout_fraction=0.3',
  ]


@pytest.fixture(scope='session')
def finished(tmp_path_factory, texts, one_layer):
  """(workdir, report, config) of the main job on tiny's first layer."""
  workdir = tmp_path_factory.mktemp('run')
  config = config_flags.load(
      f'{CONFIG}:tiny', [*texts, f'--config.model.checkpoint={one_layer}']
  )
  report, _ = run.run(config, workdir)
  return workdir, report, config
