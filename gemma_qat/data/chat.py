"""How are turns of a conversation written for an instruction-tuned Gemma 3?

Checkpoints of Google's Orbax layout carry no template, and some fine-tunes
lost theirs: this one can be given to them.
"""

import pathlib

from gemma_qat import errors

GEMMA = 'gemma'
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
