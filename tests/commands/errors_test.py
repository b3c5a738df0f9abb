"""What a user gets wrong is said in one line, with exit code 2."""

import pytest

from gemma_qat import __main__ as cli
from tests.commands import conftest

_CONFIG = f'--config={conftest.CONFIG}:tiny'


def _fails(capsys, argv, *words):
  assert cli.main([str(a) for a in argv]) == 2
  said = capsys.readouterr().err.strip().split('\n')
  assert len(said) == 1, said
  assert 'Traceback' not in said[0]
  for word in words:
    assert word in said[0], said[0]


def test_a_truncated_gguf(tmp_path, capsys):
  path = tmp_path / 'whole.gguf'
  assert cli.main([
      'quantize', '--from=random:tiny', f'--to={path}', '--format=q4_0'
  ]) == 0
  capsys.readouterr()
  whole = path.read_bytes()
  cut = tmp_path / 'cut.gguf'
  cut.write_bytes(whole[: len(whole) // 2])
  _fails(capsys, ['inspect', cut], 'cut.gguf')


def test_a_folder_without_safetensors(tmp_path, capsys):
  (tmp_path / 'config.json').write_text('{}')
  _fails(capsys, ['inspect', tmp_path], str(tmp_path), 'safetensors')


def test_a_model_that_does_not_exist(capsys):
  _fails(capsys, ['inspect', 'nowhere.gguf'], 'nowhere.gguf', 'does not exist')


@pytest.mark.parametrize('typo', [
    '--config.optimizer.learning_rat=1', '--config.trian.steps=3',
])
def test_a_config_typo(tmp_path, capsys, typo):
  _fails(capsys, ['train', _CONFIG, f'--workdir={tmp_path}/w', typo], 'config')


def test_a_value_of_the_wrong_type(tmp_path, capsys):
  _fails(capsys, [
      'train', _CONFIG, f'--workdir={tmp_path}/w', '--config.train.steps=many'
  ], 'steps')


def test_a_config_that_does_not_exist(tmp_path, capsys):
  _fails(capsys, [
      'train', '--config=experiments/configs/no.py', f'--workdir={tmp_path}'
  ], 'no.py')


def test_an_unknown_variant_of_a_config(tmp_path, capsys):
  _fails(capsys, [
      'train', f'--config={conftest.CONFIG}:huge', f'--workdir={tmp_path}/w'
  ], 'huge')


def test_an_unknown_format(tmp_path, capsys):
  _fails(capsys, [
      'quantize', '--from=random:tiny', f'--to={tmp_path}/x.gguf',
      '--format=q3_9',
  ], 'q3_9', 'q4_0')
  _fails(capsys, [
      'train', _CONFIG, f'--workdir={tmp_path}/w',
      "--config.quant.rules=(('attn', 'q3_9'),)",
  ], 'q3_9', 'q4_0')


def test_a_rule_that_matches_nothing(tmp_path, capsys):
  _fails(capsys, [
      'train', _CONFIG, f'--workdir={tmp_path}/w',
      "--config.quant.rules=(('attention', 'q4_0'),)",
  ], 'attention')
  assert not (tmp_path / 'w' / 'checkpoints').exists()


@pytest.mark.parametrize('rules, word', [
    ("(('nothing', 'scales'),)", 'nothing'),
    ("(('attn_q', 'scales'),)", 'codes have no gradient'),
])
def test_a_training_rule_that_cannot_be_fails_early(
    tmp_path, capsys, rules, word
):
  workdir = tmp_path / 'w'
  assert cli.main([
      'train', _CONFIG, f'--workdir={workdir}', f'--config.train.rules={rules}',
  ]) == 2
  assert word in capsys.readouterr().err
  # Neither text was read nor codes were found.
  assert not (workdir / 'tokens').exists()


def test_an_unknown_command(capsys):
  _fails(capsys, ['trian'], 'trian', 'train')


def test_export_of_what_is_not_quantized(tmp_path, capsys):
  _fails(capsys, [
      'export', '--from=random:tiny', f'--to={tmp_path}/x.gguf'
  ], 'quantize')


@pytest.mark.parametrize('command', cli.COMMANDS)
def test_every_command_has_help(command, capsys):
  with pytest.raises(SystemExit) as stop:
    cli.main([command, '--help'])
  assert stop.value.code == 0
  assert 'usage: gemma-qat' in capsys.readouterr().out
