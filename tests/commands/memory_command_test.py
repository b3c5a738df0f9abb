"""`gemma-qat memory` says figures, writes files and refuses nonsense."""

import json

import pytest

from gemma_qat import __main__ as cli
from gemma_qat.model import config as model_config
from gemma_qat.reporting import memory


def test_all_sizes_in_json(capsys):
  assert cli.main(['memory', '--format=q4_0', '--json', '--gpu=24GB']) == 0
  found = json.loads(capsys.readouterr().out)
  assert {f['size'] for f in found} == set(memory.SIZES)
  for f in found:
    expected = memory.estimate(
        model_config.variant(f['size']), 'q4_0', f['embedding']
    )
    assert f['total_bytes'] == expected.total
    assert f['fits'] == (expected.total <= 24 * 2**30)


def test_flags_reach_the_figures(capsys):
  assert cli.main([
      'memory', '--size=4b', '--format=q4_0', '--embedding=q6_k', '--vision',
      '--context=1000', '--kv=q8_0', '--ubatch=0', '--reserve=0.25', '--json',
  ]) == 0
  found, = json.loads(capsys.readouterr().out)
  assert found['embedding'] == 'q6_k' and found['vision_bytes'] > 8e8
  assert found['kv_tokens'] == {'local': 1000, 'global': 1000}
  assert found['reserve_bytes'] == 250_000_000
  assert found['weights_bytes']['embedding'] == 262_144 * 2560 // 256 * 210


def test_tables_and_files(tmp_path, capsys):
  plot, text = tmp_path / 'm.png', tmp_path / 'm.md'
  assert cli.main(['memory', f'--plot={plot}', f'--markdown={text}']) == 0
  said = capsys.readouterr().out
  assert '27b' in said and 'report, int4' in said
  assert plot.read_bytes()[:4] == b'\x89PNG'
  assert '| q4_0 | q8_0 |' in text.read_text(encoding='utf-8')


@pytest.mark.parametrize('flags, words', [
    (['--size=2b'], ["'2b'", '27b']),
    (['--format=q9'], ["'q9'", 'q4_0']),
    (['--gpu=fast'], ['--gpu=fast']),
    (['--size=1b', '--context=40000'], ['32,768', '40,000']),
    (['--size=1b', '--embedding=q6_k'], ['256', '1152']),
    (['--reserve=-1'], ['--reserve']),
    (['--reserve=nan'], ['--reserve']),
    (['--plot=/nowhere/at/all.png'], ['/nowhere/at/all.png']),
])
def test_mistakes_are_said_in_one_line(flags, words, capsys):
  assert cli.main(['memory', *flags]) == 2
  said = capsys.readouterr().err.strip().split('\n')
  assert len(said) == 1
  assert all(word in said[0] for word in words), said
