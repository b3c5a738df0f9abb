"""Every layout comes out and goes in again with the same numbers."""

import json

import numpy as np
import pytest

from gemma_qat import __main__ as cli
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import prepare

_VISION = 'random:tiny+vision:2'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A Q4_0 GGUF with a tower beside it, standing for a trained model."""
  folder = tmp_path_factory.mktemp('trained')
  assert cli.main([
      'quantize', f'--from={_VISION}', f'--to={folder}/model.gguf',
      '--format=q4_0',
  ]) == 0
  return folder / 'model.gguf'


def _convert(source, path, *flags, command='convert'):
  assert cli.main([
      command, f'--from={source}', f'--to={path}', *flags
  ]) == 0
  return path


def _same_text(a, b):
  left, right = detect.load(a), detect.load(b)
  assert left.config == right.config
  for name, weight in left.weights.items():
    other = right.weights[name]
    if name.endswith('norm'):
      # A GGUF holds 1 + w in float32: the gains are the same.
      weight, other = ((np.float64(w) + 1).astype(np.float32)
                       for w in (weight, other))
    np.testing.assert_array_equal(
        checkpoints.to_float32(weight), checkpoints.to_float32(other),
        err_msg=name,
    )


def _same_tower(a, b):
  left, right = detect.load(a).vision, detect.load(b).vision
  assert left.config == right.config
  for name, weight in left.weights.items():
    np.testing.assert_array_equal(
        weight.astype(np.float64), right.weights[name].astype(np.float64),
        err_msg=name,
    )


@pytest.mark.parametrize(('layout', 'name'), [
    ('huggingface', 'folder'), ('orbax', 'folder'), ('gguf', 'x.gguf'),
])
def test_plain_numbers_come_back_exactly(layout, name, tmp_path, capsys):
  source = _convert(
      'random:tiny+vision:2', tmp_path / name, f'--layout={layout}',
      '--format=f32',
  )
  said = capsys.readouterr().out
  assert 'rounded' not in said.replace('mmproj', '')
  assert 'matrices   exact' in said
  _same_text(_VISION, source)
  _same_tower(_VISION, source)


@pytest.mark.parametrize('first', ['huggingface', 'orbax'])
@pytest.mark.parametrize('second', ['huggingface', 'orbax', 'gguf'])
def test_bfloat16_goes_round_without_a_change(first, second, tmp_path):
  one = _convert(_VISION, tmp_path / 'one', f'--layout={first}')
  two = _convert(one, tmp_path / 'two.gguf', f'--layout={second}')
  three = _convert(two, tmp_path / 'three', f'--layout={first}')
  _same_text(one, three)
  _same_tower(one, three)


def test_a_trained_lattice_survives_the_unquantized_folder(
    trained, tmp_path, capsys
):
  folder = _convert(trained, tmp_path / 'folder', '--layout=huggingface')
  said = capsys.readouterr().out
  assert 'matrices   ' in said and 'rounded' in said
  again = _convert(folder, tmp_path / 'again.gguf', command='export')
  said = capsys.readouterr().out
  assert '100.00% of the blocks' in said
  given, found = detect.load(trained), detect.load(again)
  for name in prepare.matrices(given):
    np.testing.assert_array_equal(
        given.weights[name].quantized.codes,
        found.weights[name].quantized.codes, err_msg=name,
    )


def test_float32_folders_give_the_very_same_file_again(trained, tmp_path):
  folder = _convert(
      trained, tmp_path / 'folder', '--layout=huggingface', '--format=f32'
  )
  again = _convert(
      folder, tmp_path / 'model.gguf', '--format=q4_0', '--embedding=q8_0'
  )
  _same_text(trained, again)
  _same_tower(trained, again)


@pytest.mark.parametrize(('layout', 'flags', 'is_exact'), [
    ('mlx', [], True),
    ('huggingface', ['--format=w4a16', '--embedding=f32'], True),
    ('huggingface', ['--format=w4a16'], False),
    ('gemma_cpp', [], False),
])
def test_runtimes_formats_say_whether_they_hold_the_numbers(
    trained, tmp_path, capsys, layout, flags, is_exact
):
  _convert(trained, tmp_path / 'x', f'--layout={layout}', *flags)
  said = capsys.readouterr().out
  assert ('rounded' not in said) == is_exact


def test_a_chat_template_makes_a_model_that_ends_its_turns(trained, tmp_path):
  path = _convert(trained, tmp_path / 'chat.gguf', '--chat_template=gemma')
  tokenizer = detect.load(path).tokenizer
  assert tokenizer.eos_id == tokenizer.end_of_turn_id
  assert '<start_of_turn>' in tokenizer.chat_template
  assert 'stop "<end_of_turn>"' in (tmp_path / 'Modelfile').read_text()
  folder = _convert(path, tmp_path / 'chat', '--layout=huggingface')
  assert detect.load(folder).tokenizer.chat_template == tokenizer.chat_template
  ends = json.loads((folder / 'generation_config.json').read_text())
  assert tokenizer.eos_id in ends['eos_token_id']


@pytest.mark.parametrize(('flags', 'words'), [
    (['--layout=onnx'], ['onnx', 'gguf']),
    (['--layout=mlx', '--format=bf16'], ['bf16', 'q4_0']),
    (['--chat_template=nowhere'], ['nowhere']),
])
def test_mistakes_are_said_in_one_line(tmp_path, capsys, flags, words):
  argv = ['convert', '--from=random:tiny', f'--to={tmp_path}/x', *flags]
  assert cli.main(argv) == 2
  said = capsys.readouterr().err.strip()
  assert '\n' not in said
  assert all(word in said for word in words), said
  assert not list(tmp_path.iterdir())


def test_a_gguf_without_a_tokenizer_is_refused(tmp_path, capsys):
  assert cli.main([
      'convert', '--from=random:270m', f'--to={tmp_path}/x.gguf'
  ]) == 2
  assert 'no tokenizer' in capsys.readouterr().err


def test_a_model_of_turns_says_in_its_gguf_how_tokens_are_drawn(tmp_path):
  folder = _convert(
      'random:tiny', tmp_path / 'hf', '--layout=huggingface',
      '--chat_template=gemma',
  )
  said = detect.load(_convert(folder, tmp_path / 'a.gguf')).metadata
  assert said['general.sampling.top_k'] == 64
  assert said['general.sampling.top_p'] == pytest.approx(0.95)
  # A folder that says something else of itself is believed.
  settings = {'top_k': 7, 'temperature': 0.5, 'top_p': 'high', 'min_p': None}
  (folder / 'generation_config.json').write_text(json.dumps(settings))
  file = _convert(folder, tmp_path / 'b.gguf')
  again = _convert(file, tmp_path / 'c.gguf', '--format=q8_0')
  for path in (file, again):
    said = detect.load(path).metadata
    assert {k: v for k, v in said.items() if '.sampling.' in k} == {
        'general.sampling.top_k': 7, 'general.sampling.temp': 0.5,
    }


def test_a_model_without_turns_says_nothing_of_drawing(tmp_path):
  said = detect.load(_convert('random:tiny', tmp_path / 'a.gguf')).metadata
  assert not [key for key in said if '.sampling.' in key]
