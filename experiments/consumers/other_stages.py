"""What can be checked for programs that no package index has?

Ollama and LM Studio run llama.cpp's loader on the same file, so what they
want beside it is checked, and the file by llama.cpp; for gemma.cpp the file is
read by a loader of its own, and for vLLM see `folder_stages.vllm`.
"""

import pathlib
import re
import sys

import llama_stages
import session as sessions

_HERE = pathlib.Path(__file__).parent
# Ollama's reference of the Modelfile.
_INSTRUCTIONS = {
    'FROM', 'PARAMETER', 'TEMPLATE', 'SYSTEM', 'ADAPTER', 'LICENSE', 'MESSAGE',
    'REQUIRES',
}
_PARAMETERS = {
    'num_ctx', 'repeat_last_n', 'repeat_penalty', 'temperature', 'seed',
    'stop', 'num_predict', 'top_k', 'top_p', 'min_p',
}
_VARIABLES = {'.System', '.Prompt', '.Response', 'if .System', 'end'}
# Instruction and its argument, which three quotes may spread over lines.
_LINE = re.compile(r'([A-Z]+) +("""(?:.|\n)*?"""|[^\n]*)\n')


def ollama(session: sessions.Session, record: sessions.Record) -> None:
  """The Modelfile: instructions, parameters, template and files it names."""
  for name, source, flags in (
      ('270M', session.quantized(), ()),
      ('270M with chat template', session.quantized(),
       ('--chat_template=gemma',)),
      ('random, tiny with vision', 'random:tiny+vision',
       ('--format=q4_0', '--chat_template=gemma')),
  ):
    model = session.convert(
        source, f'ollama-{name.replace(" ", "-")}/model.gguf', *flags
    )
    text = model.with_name('Modelfile').read_text(encoding='utf-8')
    found = _LINE.findall(text)
    record.say(f'{name}: Modelfile', *text.splitlines())
    problems = list(_problems(text, found, model.parent))
    record.say(*problems)
    record.add(
        'Ollama (not run)', f'GGUF and Modelfile, {name}',
        "Modelfile follows Ollama's reference and names files that are there",
        f'{len(found)} instructions, {len(problems)} problems', not problems,
    )


def lm_studio(session: sessions.Session, record: sessions.Record) -> None:
  """The folder that LM Studio lists, and llama.cpp on the file in it."""
  models = session.convert(
      session.quantized(), 'lm-studio', '--publisher=example', '--format=q4_0'
  )
  files = sorted(p.relative_to(models) for p in models.rglob('*.gguf'))
  record.say(*(str(path) for path in files))
  said = llama_stages.generate(session, record, models / files[0])
  is_shaped = len(files[0].parts) == 3 and files[0].parts[0] == 'example'
  record.add(
      'LM Studio (not run)', 'GGUF as PUBLISHER/MODEL-GGUF/FILE',
      'folder shape; llama.cpp loads the file and generates', repr(said),
      is_shaped and bool(said),
  )


def gemma_cpp(session: sessions.Session, record: sessions.Record) -> None:
  """The .sbs file, decoded by a loader that knows nothing of our writer."""
  folder = session.folder()
  file = session.convert(folder, 'gemma_cpp/model.sbs', '--layout=gemma_cpp')
  output = record.run(
      [sys.executable, _HERE / 'gemma_cpp_file.py', file, '--against', folder]
  )
  lines = [line for line in output.splitlines() if line.strip()]
  record.add(
      'gemma.cpp (not run)', '.sbs, SFP8',
      'a loader of its own finds every matrix with the nearest numbers',
      lines[-1], True,
  )


def _problems(text, found, folder: pathlib.Path):
  """Yields what Ollama would refuse or misread."""
  if ''.join(f'{key} {value}\n' for key, value in found) != text:
    yield 'there are lines that are no instruction'
  for key, value in found:
    if key not in _INSTRUCTIONS:
      yield f'unknown instruction {key}'
    if key == 'PARAMETER' and value.split(' ')[0] not in _PARAMETERS:
      yield f'unknown parameter {value}'
    if key == 'FROM' and not (folder / value).read_bytes()[:4] == b'GGUF':
      yield f'{value} is no GGUF file'
    if key == 'TEMPLATE':
      actions = re.findall(r'\{\{ (.*?) \}\}', value)
      if unknown := set(actions) - _VARIABLES:
        yield f'unknown actions {sorted(unknown)}'
      if actions.count('end') != sum(a.startswith('if ') for a in actions):
        yield 'an if without end'
      if '.Prompt' not in actions:
        yield 'the prompt is not in the template'
  if not any(key == 'FROM' for key, _ in found):
    yield 'FROM is missing'
