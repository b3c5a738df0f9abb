"""Turns look as Gemma was trained on them."""

import pytest

from gemma_qat import errors
from gemma_qat.data import chat


def _render(messages, add_generation_prompt=True):
  environment = pytest.importorskip('jinja2').Environment()
  return environment.from_string(chat.template('gemma')).render(
      messages=messages, bos_token='<bos>',
      add_generation_prompt=add_generation_prompt,
  )


def test_turns_alternate_and_end_with_the_models():
  said = _render([
      {'role': 'user', 'content': ' Hi '},
      {'role': 'assistant', 'content': 'Ho'},
      {'role': 'user', 'content': 'So?'},
  ])
  assert said == (
      '<bos><start_of_turn>user\nHi<end_of_turn>\n'
      '<start_of_turn>model\nHo<end_of_turn>\n'
      '<start_of_turn>user\nSo?<end_of_turn>\n'
      '<start_of_turn>model\n'
  )


def test_the_system_prompt_opens_the_first_user_turn_only():
  said = _render([
      {'role': 'system', 'content': 'Be brief.'},
      {'role': 'user', 'content': 'Hi'},
      {'role': 'assistant', 'content': 'Ho'},
      {'role': 'user', 'content': 'So?'},
  ], add_generation_prompt=False)
  assert said.count('Be brief.') == 1
  assert said.startswith('<bos><start_of_turn>user\nBe brief.\n\nHi<end')
  assert said.endswith('So?<end_of_turn>\n')


def test_images_stand_where_they_were_given():
  said = _render([{'role': 'user', 'content': [
      {'type': 'image'}, {'type': 'text', 'text': 'What is it?'},
  ]}])
  assert 'user\n<start_of_image>What is it?<end_of_turn>' in said


def test_a_file_may_hold_the_template(tmp_path):
  (tmp_path / 'x.jinja').write_text('{{ bos_token }}', encoding='utf-8')
  assert chat.template(str(tmp_path / 'x.jinja')) == '{{ bos_token }}'
  (tmp_path / 'y.jinja').write_bytes(b'\xff\xfe\x00')
  with pytest.raises(errors.UserError, match='y.jinja'):
    chat.template(str(tmp_path / 'y.jinja'))
  with pytest.raises(errors.UserError, match='nowhere'):
    chat.template('nowhere')
