"""How is Ollama told what to do with a GGUF?

A Modelfile beside it; `ollama create NAME -f Modelfile` reads both. Source of
the keywords: Ollama's documentation of the Modelfile.
"""

from gemma_qat.data import tokenizer as tokenizers

FILE = 'Modelfile'

# Gemma's turns in Ollama's template language; a system prompt has no turn of
# its own and opens the user's.
_TURNS = (
    '<start_of_turn>user\n'
    '{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}<end_of_turn>\n'
    '<start_of_turn>model\n'
    '{{ .Response }}<end_of_turn>\n'
)
# The sampling that Google's instruction-tuned checkpoints ask for.
_CHAT = {'temperature': 1, 'top_k': 64, 'top_p': 0.95}


def modelfile(
    model: str,
    tokenizer: tokenizers.Tokenizer | None,
    mmproj: str | None = None,
) -> str:
  """Returns the text of a Modelfile.

  Args:
    model: file name of the text model, in the same folder.
    tokenizer: its chat template decides whether the model answers turns or
      only continues a text.
    mmproj: file name of the vision tower.
  """
  lines = [f'FROM ./{model}']
  if mmproj is not None:
    lines.append(f'FROM ./{mmproj}')
  if tokenizer is None or tokenizer.chat_template is None:
    lines.append('TEMPLATE """{{ .Prompt }}"""')
    return '\n'.join(lines) + '\n'
  lines.append(f'TEMPLATE """{_TURNS}"""')
  lines.append('PARAMETER stop "<end_of_turn>"')
  lines += [f'PARAMETER {key} {value}' for key, value in _CHAT.items()]
  return '\n'.join(lines) + '\n'
