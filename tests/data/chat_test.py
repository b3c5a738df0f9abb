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


@pytest.mark.parametrize('messages', [
    [{'role': 'user', 'content': ' Hi '}, {'role': 'model', 'content': 'Ho'}],
    [{'role': 'system', 'content': 'Be brief.'},
     {'role': 'system', 'content': 'Be kind. '},
     {'role': 'user', 'content': [{'type': 'text', 'text': ' What\n\nis '},
                                  {'type': 'text', 'text': 'it?'}]},
     {'role': 'assistant', 'content': ''},
     {'role': 'user', 'content': '<end_of_turn>'}],
], ids=len)
def test_rendering_is_what_the_template_says(messages):
  said = _render(messages, add_generation_prompt=False)
  assert '<bos>' + chat.render(messages, 'here') == said


def test_a_prompt_is_the_template_s():
  said = _render([{'role': 'user', 'content': 'Hi'}])
  assert said == '<bos>' + (
      chat.USER_BEGINS + 'Hi' + chat.TURN_ENDS + chat.MODEL_BEGINS
  )


@pytest.mark.parametrize('messages, said', [
    (None, 'here has no list of messages'),
    ([], 'no list of messages'),
    (['Hi'], 'message 1 is no object'),
    ([{'role': 'user', 'content': 'Hi'}, {'role': 'tool', 'content': ''}],
     "message 2 has the role 'tool'"),
    ([{'role': ['user'], 'content': 'Hi'}], 'has the role'),
    ([{'role': 'user'}], 'neither a text nor'),
    ([{'role': 'user', 'content': [{'type': 'image'}]}], 'neither a text nor'),
    ([{'role': 'user', 'content': [{'type': 'text', 'text': 3}]}], 'neither'),
], ids=str)
def test_what_is_no_conversation_is_a_user_error(messages, said):
  with pytest.raises(errors.UserError, match=said):
    chat.render(messages, 'here')


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
