"""Ollama is told the files, the turns and where an answer ends."""

import dataclasses

from gemma_qat.checkpoints import ollama


def test_a_model_without_turns_continues_text(tiny):
  said = ollama.modelfile('m.gguf', tiny.tokenizer)
  assert said.splitlines() == ['FROM ./m.gguf', 'TEMPLATE """{{ .Prompt }}"""']


def test_a_chat_model_gets_turns_stop_and_tower(tiny):
  chat = dataclasses.replace(tiny.tokenizer, chat_template='{{ bos_token }}')
  said = ollama.modelfile('m.gguf', chat, 'mmproj-m.gguf')
  assert said.startswith('FROM ./m.gguf\nFROM ./mmproj-m.gguf\nTEMPLATE """')
  assert 'PARAMETER stop "<end_of_turn>"\n' in said
  template = said.split('"""')[1]
  filled = template.replace('{{ .Prompt }}', 'Hi').replace(
      '{{ .Response }}', 'Ho'
  ).replace('{{ if .System }}{{ .System }}\n\n{{ end }}', '')
  assert filled == (
      '<start_of_turn>user\nHi<end_of_turn>\n'
      '<start_of_turn>model\nHo<end_of_turn>\n'
  )
