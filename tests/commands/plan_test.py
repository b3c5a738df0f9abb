"""`gemma-qat plan` says what a run takes, or in one line what is wrong."""

import dataclasses
import importlib.util
import json

import pytest

from gemma_qat import __main__ as cli
from gemma_qat.checkpoints import huggingface_out
from gemma_qat.checkpoints import random_weights
from gemma_qat.commands import plan_sheets
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.model import config as model_config

CONFIG = '--config=experiments/configs/base.py:tiny'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """A folder with a model of one layer, which compiles in seconds."""
  folder = tmp_path_factory.mktemp('checkpoint') / 'model'
  one = dataclasses.replace(model_config.variant('tiny'), num_layers=1)
  model = random_weights.make(
      one, tokenizer=tokenizers.tiny_tokenizer(one.vocab_size)
  )
  huggingface_out.save(folder, model, 'float32')
  return folder


def test_a_plan_says_memory_traffic_and_time(checkpoint, tmp_path, capsys):
  out = tmp_path / 'plan.json'
  assert cli.main([
      'plan', CONFIG, f'--config.model.checkpoint={checkpoint}',
      '--config.mesh.fsdp=2', '--topology=gpu:2xH100', f'--json={out}',
  ]) == 0
  said = capsys.readouterr()
  for words in ('optimizer', 'teacher', 'H100 has', 'left over', 'all-gather',
                'step at best', 'fsdp=2', 'XLA:CPU'):
    assert words in said.out, words
  assert 'compiling a step' in said.err
  found = json.loads(out.read_text(encoding='utf-8'))
  assert found['mesh'] == {'data': 1, 'fsdp': 2, 'tensor': 1}
  assert found['device']['name'] == 'H100' and found['devices'] == 2
  assert found['spare_bytes'] > 0
  assert found['collectives']['all-gather']['sent_bytes'] > 0
  needed = found['needed_bytes'] - sum(found['arguments_bytes'].values())
  assert needed > 0


def test_a_table_has_a_cell_for_every_column(checkpoint, tmp_path):
  out = tmp_path / 'plan.json'
  assert cli.main([
      'plan', CONFIG, f'--config.model.checkpoint={checkpoint}',
      '--topology=gpu:1xH100', f'--json={out}',
  ]) == 0
  sheet = plan_sheets.table([json.loads(out.read_text(encoding='utf-8'))])
  row, = sheet.rows
  assert len(row) == len(sheet.columns)
  assert row[:3] == ('custom', 'gpu:1xH100', '1 x 1 x 1')


@pytest.mark.parametrize('flags, words', [
    (['--topology=v9:2x2'], ['v9:2x2', 'v5p:4x4x4']),
    (['--topology=gpu:8xK80'], ['gpu:8xK80', 'H100']),
    (['--topology=gpu:8xH100', '--size=2b'], ["'2b'", '27b']),
    (['--topology=gpu:8xH100', '--size=4b', '--config.mesh.fsdp=3'],
     ['config.mesh', 'there are 8']),
    (['--topology=gpu:8xH100', '--size=1b', '--config.mesh.fsdp=8'],
     ['blocks of 32', 'config.mesh fsdp']),
    (['--topology=gpu:8xH100', '--config.model.checkpoint=nowhere'],
     ['nowhere', '--size=4b']),
])
def test_mistakes_are_said_in_one_line(flags, words, capsys):
  assert cli.main(['plan', CONFIG, *flags]) == 2
  said = capsys.readouterr().err.strip().split('\n')[-1]
  assert said.startswith('gemma-qat plan: ')
  assert all(word in said for word in words), said


@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is not None,
    reason='libtpu is installed',
)
def test_without_libtpu_the_way_to_it_is_said(capsys):
  assert cli.main(['plan', CONFIG, '--topology=v5e:2x2']) == 2
  assert "pip install -e '.[tpu]'" in capsys.readouterr().err
