"""In what do two GGUF files differ, and which differences are choices?"""

import os

from gemma_qat.checkpoints import gguf_header
import numpy as np

# Where our file says something else than llama.cpp's converter on purpose.
CHOICES = {
    'general.name': "a name: the converter takes the folder's",
    'general.basename': "guessed by the converter from the folder's name",
    'general.finetune': "guessed by the converter from the folder's name",
    'general.size_label': 'for display only; ours leaves it out',
    'tokenizer.ggml.add_sep_token': "false, llama.cpp's default where absent",
    'tokenizer.ggml.eot_token_id': 'llama.cpp would find <end_of_turn> by its '
                                   'text; ours says it',
    'tokenizer.ggml.scores of what is no NORMAL piece':
        'no merge sees them; the converter writes -1000 for added tokens',
    'mm.input_projection.weight': 'float32 in ours, which every bfloat16 '
                                  'number fits; the converter rounds to '
                                  'float16',
}
_NORMAL = 1


def compare(
    theirs: str | os.PathLike, ours: str | os.PathLike
) -> tuple[list[str], int]:
  """Compares all keys and all tensors.

  Returns:
    (a line for every difference and a summary, how many are no `CHOICES`).
  """
  files = [gguf_header.read(path) for path in (theirs, ours)]
  differences = _metadata(*(f.metadata for f in files))
  differences |= _tensors(theirs, ours, *(f.tensors for f in files))
  lines = [
      f'{key}: {what}; {CHOICES.get(key, "UNEXPLAINED")}'
      for key, what in differences.items()
  ]
  lines.append(
      f'{len(files[1].metadata)} keys and {len(files[1].tensors)} tensors of '
      'ours compared, types, shapes and bytes'
  )
  return lines, len(differences.keys() - CHOICES.keys())


def blocks(
    ours: str | os.PathLike,
    theirs: str | os.PathLike,
    kind: str,
    block_bytes: int,
) -> tuple[int, int]:
  """Counts the blocks of our tensors of a type that differ in their file.

  Raises:
    RuntimeError: a tensor is of another type there.
  """
  differ = count = 0
  others = gguf_header.read(theirs).tensors
  for name, tensor in gguf_header.read(ours).tensors.items():
    if tensor.type.name != kind:
      continue
    if others[name].type != tensor.type:
      raise RuntimeError(f'{name} is {others[name].type.name}, not {kind}.')
    a, b = (
        gguf_header.read_bytes(path, t).reshape(-1, block_bytes)
        for path, t in ((ours, tensor), (theirs, others[name]))
    )
    differ += int(np.any(a != b, axis=1).sum())
    count += len(a)
  return differ, count


def _metadata(theirs, ours):
  found = {}
  for key in sorted({*theirs, *ours}):
    a, b = theirs.get(key), ours.get(key)
    if _same(a, b):
      continue
    if key == 'tokenizer.ggml.scores' and len(a) == len(b):
      at = np.flatnonzero(np.asarray(a) != np.asarray(b))
      types = np.asarray(ours['tokenizer.ggml.token_type'])
      if np.all(types[at] != _NORMAL):
        key += ' of what is no NORMAL piece'
      found[key] = f'{len(at)} differ, {_short(a[at[0]])} | {_short(b[at[0]])}'
      continue
    found[key] = f'{_short(a)} | {_short(b)}'
  return found


def _tensors(theirs_path, ours_path, theirs, ours):
  found = {}
  for name in sorted({*theirs, *ours}):
    a, b = theirs.get(name), ours.get(name)
    if a is None or b is None:
      found[name] = f'{a and a.type.name} | {b and b.type.name}'
    elif (a.type, a.shape) != (b.type, b.shape):
      found[name] = (
          f'{a.type.name} {a.shape} | {b.type.name} {b.shape}'
      )
    elif not np.array_equal(
        gguf_header.read_bytes(theirs_path, a),
        gguf_header.read_bytes(ours_path, b),
    ):
      found[name] = 'other bytes'
  return found


def _same(a, b):
  if a is None or b is None:
    return a is b
  if isinstance(a, (list, tuple, np.ndarray)):
    return len(a) == len(b) and all(x == y for x, y in zip(a, b))
  return type(a) is type(b) and a == b


def _short(value):
  if isinstance(value, (list, tuple, np.ndarray)):
    return f'{len(value)} values'
  said = str(value)
  return repr(said if len(said) < 40 else said[:40] + '...')
