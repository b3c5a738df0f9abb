"""Do transformers, compressed-tensors, mlx-lm and gemma compute what we do?

Each loads what we exported, in its own environment, and gives its logits for
the same tokens; ours are computed by JAX from the file that the export was
made from.
"""

import pathlib

import numpy as np
import session as sessions

_HERE = pathlib.Path(__file__).parent
# Of the largest logit: float32 sums in another order stay below it.
_EXACT = 1e-4
# Computed in bfloat16, near ties between tokens fall the other way.
_LEAST_ARGMAX = 0.85


def transformers(session: sessions.Session, record: sessions.Record) -> None:
  """Plain folders, a GGUF, and a folder with a vision tower."""
  tool = session.version('transformers', 'transformers', 'torch')
  ours = session.folder()
  full = session.convert(
      'gemma3-270m', 'base-f32', '--layout=huggingface', '--format=f32'
  )
  model = session.quantized()
  for layout, export, source, dtype, is_exact in (
      ('Hugging Face f32', full, full, 'float32', True),
      ('Hugging Face bf16', ours, ours, 'float32', True),
      ('Hugging Face bf16', ours, ours, 'bfloat16', False),
      ('GGUF q4_0 (gguf_file=)', model, model, 'float32', True),
  ):
    _logits(session, record, 'transformers', tool, layout, export, source,
            is_exact, 'transformers_folder.py', f'--dtype={dtype}')
  tiny = session.convert(
      'random:tiny+vision', 'tiny-vision', '--layout=huggingface',
      '--format=bf16',
  )
  output = _logits(
      session, record, 'transformers', tool, 'Hugging Face bf16 with vision '
      '(random, tiny)', tiny, tiny, True, 'transformers_folder.py',
  )
  lines = ('Gemma3ForConditionalGeneration', 'missing_keys: []',
           'unexpected_keys: []', 'Gemma3Processor')
  record.add(
      tool, 'Hugging Face bf16 with vision (random, tiny)',
      'Gemma3ForConditionalGeneration and its processor load',
      'no tensor missing or left over',
      all(line in output for line in lines),
  )


def vllm(session: sessions.Session, record: sessions.Record) -> None:
  """What vLLM would load, by the decoder that it has from the same library."""
  tool = session.version(
      'transformers', 'compressed-tensors', 'transformers'
  )
  model = session.quantized()
  for name, flags, is_exact in (
      ('embedding and scales float32',
       ('--embedding=f32', '--scales=float32'), True),
      ('as by default', (), False),
  ):
    folder = session.convert(
        model, f'w4a16-{"exact" if is_exact else "default"}',
        '--layout=huggingface', '--format=w4a16', *flags,
    )
    _logits(session, record, 'transformers', f'vLLM (not run): {tool}',
            f'Hugging Face W4A16, {name}', folder, model, is_exact,
            'transformers_folder.py')


def mlx(session: sessions.Session, record: sessions.Record) -> None:
  """Codes and scales as MLX's affine groups."""
  tool = session.version('mlx', 'mlx-lm', 'mlx')
  model = session.quantized()
  folder = session.convert(model, 'mlx-folder', '--layout=mlx')
  _logits(session, record, 'mlx', tool,
          'MLX, 4 bits, scales auto', folder, model, True, 'mlx_folder.py',
          rounded=True)


def gemma(session: sessions.Session, record: sessions.Record) -> None:
  """Google's own library on the Orbax layout."""
  tool = session.version('gemma', 'gemma', 'jax')
  folder = session.convert(
      'gemma3-270m', 'orbax', '--layout=orbax', '--format=bf16'
  )
  _logits(session, record, 'gemma', tool,
          'Orbax bf16', folder, session.folder(), True, 'gemma_library.py')


def _logits(session, record, venv, tool, layout, export, source, is_exact,
            script, *flags, rounded=False):
  """Runs a consumer's script on an export; compares with our logits."""
  name = _name(session, source)
  tokens = session.own(f'logits/{name}-tokens.npy', 'tokens', source)
  options = ('--rounded',) if rounded else ()
  expected = session.own(
      f'logits/{name}{"-rounded" if rounded else ""}.npy', 'logits', source,
      f'--tokens={tokens}', *options,
  )
  out = session.work / 'logits' / 'found.npy'
  output = record.run(
      [session.python(venv), _HERE / script, export, f'--tokens={tokens}',
       f'--out={out}', *flags],
      keep=r'^(?!.*(Warning|warn|Loading weights|it/s))',
      environment={'CUDA_VISIBLE_DEVICES': '', 'JAX_PLATFORMS': 'cpu'},
  )
  found, expected = np.load(out), np.load(expected)
  found = found[:, : expected.shape[1]]
  difference = float(np.abs(found - expected).max())
  largest = float(np.abs(expected).max())
  same = found.argmax(-1) == expected.argmax(-1)
  figure = (f'argmax equal at {same.sum()} of {len(same)}; largest difference '
            f'{difference:.2g} of {largest:.4g}')
  record.say(figure)
  checked = 'logits are ours'
  if not is_exact:
    checked = 'logits are near ours (bfloat16 in file or computation)'
  elif flags and 'bf16' in layout:
    checked += ', computed in float32'
  record.add(
      tool, layout, checked, figure,
      bool(same.all() and difference < _EXACT * largest) if is_exact
      else bool(same.mean() >= _LEAST_ARGMAX),
  )
  return output


def _name(session, source):
  path = pathlib.Path(source).resolve()
  if path.is_relative_to(session.work):
    path = path.relative_to(session.work)
  return '-'.join(path.parts).replace('/', '').removesuffix('.gguf')
