"""How are turns of a conversation written for an instruction-tuned Gemma 3?

Checkpoints of Google's Orbax layout carry no template, and some fine-tunes
lost theirs: this one can be given to them. `render` writes the same without
Jinja, for text to train on.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_qat import errors

GEMMA = 'gemma'
# What stands around a user's turn and before the model's.
TURN_BEGINS = '<start_of_turn>'
USER_BEGINS = f'{TURN_BEGINS}user\n'
TURN_ENDS = '<end_of_turn>'
MODEL_BEGINS = '\n<start_of_turn>model\n'
_SPEAKERS = {'user': 'user', 'assistant': 'model', 'model': 'model'}
_LARGEST = 2**20

# In Jinja, as `tokenizer.chat_template` and chat_template.jinja hold it. Gemma
# has no system turn: what it says opens the user's turn. The template begins
# with BOS, so a runtime must not add another one.
TEMPLATE = """\
{{- bos_token -}}
{%- set state = namespace(system='') -%}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- if message['role'] == 'system' -%}
    {%- if content is not string -%}
      {%- set content = content[0]['text'] -%}
    {%- endif -%}
    {%- set state.system = state.system + content + '\\n\\n' -%}
  {%- else -%}
    {%- set role = message['role'] -%}
    {{- '<start_of_turn>' + ('model' if role == 'assistant' else role) + '\\n' -}}
    {%- if role == 'user' -%}
      {{- state.system -}}
      {%- set state.system = '' -%}
    {%- endif -%}
    {%- if content is string -%}
      {{- content | trim -}}
    {%- else -%}
      {%- for part in content -%}
        {%- if part['type'] == 'image' -%}
          {{- '<start_of_image>' -}}
        {%- elif part['type'] == 'text' -%}
          {{- part['text'] | trim -}}
        {%- endif -%}
      {%- endfor -%}
    {%- endif -%}
    {{- '<end_of_turn>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


def render(messages: Sequence[Mapping[str, Any]], where: str) -> str:
  """Writes a conversation as the template above does, without BOS.

  Args:
    messages: each with `role` (system, user, assistant or model) and `content`,
      a text or a list of parts of the type 'text'.
    where: their place, for messages of errors.

  Raises:
    UserError: not such a list, or an image, which is no text.
  """
  if not isinstance(messages, list) or not messages:
    raise errors.UserError(
        f'{where} has no list of messages: give one of objects with role and '
        'content.'
    )
  said, system = '', ''
  for number, message in enumerate(messages, 1):
    place = f'{where}, message {number}'
    if not isinstance(message, Mapping):
      raise errors.UserError(
          f'{place} is no object: give it a role and a content.'
      )
    role, content = message.get('role'), message.get('content')
    if role == 'system':
      system += ''.join(_texts(content, place)) + '\n\n'
      continue
    if not isinstance(role, str) or role not in _SPEAKERS:
      raise errors.UserError(
          f'{place} has the role {role!r}: use system, user or assistant.'
      )
    said += f'<start_of_turn>{_SPEAKERS[role]}\n'
    if role == 'user':
      said, system = said + system, ''
    said += ''.join(t.strip() for t in _texts(content, place))
    said += f'{TURN_ENDS}\n'
  return said


def template(name: str) -> str:
  """Returns 'gemma', the template above, or the contents of a file.

  Raises:
    UserError: no such file, or not the text of a template.
  """
  if name == GEMMA:
    return TEMPLATE
  path = pathlib.Path(name)
  if not path.is_file() or path.stat().st_size > _LARGEST:
    raise errors.UserError(
        f'The chat template {name} is no file of at most 1 MB: give one, or '
        f"'{GEMMA}' for Gemma's own turns."
    )
  try:
    return path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
        f'The chat template {name} cannot be read: {error}.'
    ) from error


def _texts(content, place: str) -> list[str]:
  if isinstance(content, str):
    return [content]
  texts = [
      part.get('text') for part in content if isinstance(part, Mapping)
      and part.get('type') == 'text' and isinstance(part.get('text'), str)
  ] if isinstance(content, list) else []
  if not texts or len(texts) < len(content):
    raise errors.UserError(
        f'{place} has a content that is neither a text nor a list of texts: '
        'leave this conversation out.'
    )
  return texts
