"""Which points does a config's sweep(add) make, and what is refused?"""

import pytest

from gemma_qat import errors
from gemma_qat.commands import sweep_points
from gemma_qat.reporting import report
from gemma_qat.training import workdir

_HEAD = '''
from experiments.configs import base

def get_config(variant=''):
  return base.get_config(variant)

'''


def _read(tmp_path, body, *overrides):
  file = tmp_path / 'points.py'
  lines = ''.join(f'  {line}\n' for line in body.split('\n'))
  file.write_text(f'{_HEAD}def sweep(add):\n{lines}', encoding='utf-8')
  return sweep_points.read(f'{file}:tiny', overrides)


def test_points_are_the_config_with_their_changes(tmp_path):
  rules = (('^embedding$', None), ('norm$', 'norms'))
  first, second, third = _read(
      tmp_path,
      "add('as-is')\n"
      f"add('other', {{'train.rules': {rules}, 'optimizer.clip': 2}})\n"
      "add('s1', {'quant.start': 'search'}, seed=1)",
      '--config.train.batch_size=16',
  )
  assert [p.name for p in (first, second, third)] == ['as-is', 'other', 's1']
  assert second.config.train.rules == rules
  assert second.config.optimizer.clip == 2.0
  assert third.config.quant.start == 'search' and third.config.seed == 1
  # The others' changes are not theirs; the variant and overrides are.
  assert first.changes == {} and first.config.seed == 0
  assert first.config.train.rules != rules
  for point in (first, second, third):
    assert point.config.train.batch_size == 16
    assert point.config.train.steps == 8
    assert point.config.is_locked


@pytest.mark.parametrize('body, words', [
    ("add('a', {'optimizer.learning_rat': 1.0})",
     ("'a'", 'optimizer.learning_rat ', 'learning_rate?')),
    ("add('a', {'trane.steps': 1})", ('trane.steps', 'train.steps?')),
    ("add('a', {'train.steps.more': 1})", ('train.steps.more',)),
    ("add('a', sead=1)", ('sead', 'seed?')),
    ("add('a', {'train.steps': 2.5})", ('train.steps=2.5', 'float', 'int')),
    ("add('a', {'train.steps': True})", ('train.steps=True', 'bool', 'int')),
    ("add('a', {'train.steps': None})", ('train.steps=None', 'int')),
    ("add('a', {'quant.rules': 'q4_0'})", ('quant.rules', 'str', 'tuple')),
    ("add('a', {'optimizer': {}})", ('optimizer is a section',
                                     'as optimizer.')),
    ("add('a', ['seed'])", ("['seed']", 'optimizer.learning_rate')),
    ("add('a', {'quant.start': 'best'})", ("'a'", 'best', 'gptq')),
    ("add('a', {'quant.rules': (('x', 'q3_9'),)})", ("'a'", 'q3_9')),
    ("add('a', {'quant.rules': (1, 2)})", ("'a'",)),
    ("add('a', {'optimizer.warmup_steps': 9})", ("'a'", 'warmup_steps=9')),
    ("add('a')\nadd('A')", ("'A'", 'own name')),
    ("add('../a')", ("'../a'", 'folder')),
    ("add('a,b')", ("'a,b'",)),
    ("add('3')", ("'3'", 'digits')),
    ("add(3)", ('3',)),
    ('pass', ('no point',)),
    ('add(nothing)', ('NameError', 'nothing')),
])
def test_what_cannot_be_is_refused_in_a_line(tmp_path, body, words):
  with pytest.raises(errors.UserError) as caught:
    _read(tmp_path, body)
  for word in ('points.py', *words):
    assert word in str(caught.value), str(caught.value)


def test_a_config_without_a_sweep_is_told_how_to_have_one():
  with pytest.raises(errors.UserError, match=r'defines no sweep\(add\)'):
    sweep_points.read('experiments/configs/base.py:tiny')


def test_an_override_of_what_points_change_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match='--config.seed=4.* a, b '):
    _read(tmp_path, "add('a', seed=1)\nadd('b', seed=2)", '--config.seed=4')


def test_points_are_chosen_by_name_and_found_by_index(tmp_path):
  points = _read(tmp_path, "for n in 'abc': add(n)")
  assert sweep_points.choose(points, None) == points
  assert sweep_points.choose(points, 'c,a') == [points[0], points[2]]
  assert sweep_points.find(points, '1') is points[1]
  assert sweep_points.find(points, 'c') is points[2]
  for call in (
      lambda: sweep_points.choose(points, 'a,d'),
      lambda: sweep_points.choose(points, ''),
      lambda: sweep_points.find(points, '3'),
      lambda: sweep_points.find(points, ''),
  ):
    with pytest.raises(errors.UserError, match='a, b, c'):
      call()


def test_a_point_s_state_is_read_from_its_folder(tmp_path):
  a, b = _read(tmp_path, "add('a')\nadd('b', seed=1)")
  folder = tmp_path / 'a'
  assert sweep_points.state(a, folder).kind == sweep_points.NEW
  workdir.claim(folder, a.config)
  assert sweep_points.state(a, folder).kind == sweep_points.BEGUN
  (folder / report.JSON).write_text('{}')
  assert sweep_points.state(a, folder).kind == sweep_points.FINISHED
  kind, text = sweep_points.state(b, folder)
  assert kind == sweep_points.REFUSED and 'seed was 0, now 1' in text
