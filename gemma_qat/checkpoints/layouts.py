"""Which layouts can be written, in which formats, and by which file?

Another layout is another entry in `LAYOUTS` and the file that its writer calls.
"""

import dataclasses
import math
import os
import pathlib
import re
from typing import Callable, Mapping, NamedTuple

from gemma_qat import errors
from gemma_qat.checkpoints import atomic
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import gemma_cpp_files
from gemma_qat.checkpoints import gemma_files
from gemma_qat.checkpoints import gguf_files
from gemma_qat.checkpoints import gguf_vision
from gemma_qat.checkpoints import huggingface_json
from gemma_qat.checkpoints import huggingface_out
from gemma_qat.checkpoints import mlx_files
from gemma_qat.checkpoints import ollama
from gemma_qat.checkpoints import prepare
from gemma_qat.quant import formats

_GGUF_FLOATS = {'float32': 'f32', 'float16': 'f16', 'bfloat16': 'bf16'}


@dataclasses.dataclass(frozen=True)
class Target:
  """What a user asks for.

  Attributes:
    layout: key in `LAYOUTS`.
    format: of the layers' matrices; None for what they are in already.
    embedding: of the embedding; None as above, or q8_0 where the matrices are
      rounded and it is not.
    scales: dtype of block scales where a layout leaves the choice: 'auto' for
      bfloat16 where that is exact, float32 elsewhere.
    mmproj: float type of a vision tower in GGUF: 'bf16', 'f16', 'f32', or
      'none' to leave it out.
    publisher: of the folder that LM Studio looks for; '' for none.
    chat_template: 'gemma' or a file, instead of the checkpoint's own; the
      model is then one that answers turns and ends them.
  """

  layout: str = 'gguf'
  format: str | None = None
  embedding: str | None = None
  scales: str = 'auto'
  mmproj: str = 'bf16'
  publisher: str = ''
  chat_template: str = ''


class Written(NamedTuple):
  """paths: the files or folder. num_bytes: of tensors by type. notes: what
  else a user should know, a line each."""

  paths: tuple[pathlib.Path, ...]
  num_bytes: dict[str, int]
  notes: tuple[str, ...] = ()


class Layout(NamedTuple):
  """What a layout can hold.

  formats, embeddings: names that `Target` may have -> what `prepare` makes of
  the weights; None leaves them as they are for the writer to round.
  embedding: of a plain embedding beside matrices that become codes.
  write: writes the prepared checkpoint.
  """

  formats: dict[str, str | None]
  embeddings: dict[str, str | None]
  embedding: str | None
  write: Callable[
      [checkpoints.Checkpoint, pathlib.Path, Target, checkpoints.OnPiece],
      Written,
  ]


def get(name: str) -> Layout:
  """Returns a layout by name, or a UserError that lists the names."""
  if name not in LAYOUTS:
    raise errors.UserError(
        f'Unknown layout {name!r}: choose one of {", ".join(LAYOUTS)}.'
    )
  return LAYOUTS[name]


def check(target: Target) -> None:
  """Refuses a target whose formats its layout does not have."""
  layout = get(target.layout)
  for field, allowed in (
      ('format', layout.formats), ('embedding', layout.embeddings)
  ):
    value = getattr(target, field)
    if value is not None and value not in allowed:
      choice = ', '.join(allowed) or 'none: it follows from the layout'
      raise errors.UserError(
          f'The layout {target.layout} has no {field} {value!r}: choose '
          f'{"one of " if allowed else ""}{choice}.'
      )
  for field, allowed in (
      ('scales', ('auto', 'bfloat16', 'float16', 'float32')),
      ('mmproj', (*gguf_vision.FLOAT_TYPES, 'none')),
  ):
    if getattr(target, field) not in allowed:
      raise errors.UserError(
          f'{field}: {getattr(target, field)!r} is not one of '
          f'{", ".join(allowed)}.'
      )


def choices(
    checkpoint: checkpoints.Checkpoint, target: Target
) -> dict[str, str]:
  """Says what `prepare` has to make of which weight for a target."""
  layout, found = get(target.layout), {}
  if target.format is not None:
    choice = layout.formats[target.format]
    found = dict.fromkeys(prepare.matrices(checkpoint), choice)
    is_plain = checkpoint.weights.entries['embedding'].format is None
    if choice in formats.FORMATS and is_plain:
      found['embedding'] = layout.embedding
  if target.embedding is not None:
    found['embedding'] = layout.embeddings[target.embedding]
  return {name: choice for name, choice in found.items() if choice}


def save_gguf(
    checkpoint: checkpoints.Checkpoint,
    path: str | os.PathLike,
    float_types: Mapping[str, str],
    on_piece: checkpoints.OnPiece | None = None,
) -> dict[str, int]:
  """Writes the text model alone as one GGUF; see `gguf_files.save`.

  Args:
    float_types: by-layer name -> type of a plain matrix; the others keep the
      type that they have.
  """
  kept = {
      n: _GGUF_FLOATS[prepare.float_type(e)]
      for n, e in checkpoint.weights.entries.items()
  }
  # llama.cpp draws tokens as the file says, unless it is told otherwise.
  metadata = {
      k: v for k, v in checkpoint.metadata.items() if k.startswith('general.')
  } if checkpoint.layout == 'gguf' else huggingface_json.sampling(checkpoint)
  return gguf_files.save(
      path, checkpoint.config, checkpoint.weights, checkpoint.tokenizer,
      metadata, {**kept, **float_types}, on_piece,
  )


def model_name(checkpoint: checkpoints.Checkpoint) -> str:
  """Names a model for files and folders: no path, nothing odd."""
  default = f'gemma-3-{checkpoint.config.variant}'
  name = str(checkpoint.metadata.get('general.name') or default)
  return re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('.-') or default


def _gguf(checkpoint, path, target, on_piece):
  """One file, its Modelfile, and an mmproj where there is a vision tower."""
  checkpoints.tokenizer(checkpoint)  # No runtime loads a file without.
  name = model_name(checkpoint)
  if target.publisher:
    path = _lm_studio(path, name, target)
  float_types = {}
  if target.format in _GGUF_FLOATS.values():
    float_types = dict.fromkeys(prepare.matrices(checkpoint), target.format)
  if target.embedding is not None:
    float_types['embedding'] = target.embedding
  num_bytes = save_gguf(checkpoint, path, float_types, on_piece)
  paths, notes, mmproj = [path], [], None
  if checkpoint.vision is not None and target.mmproj != 'none':
    mmproj = path.with_name(gguf_vision.name_for(path))
    _, change = gguf_vision.save(
        mmproj, checkpoint.vision, name, target.mmproj
    )
    paths.append(mmproj)
    exact = 'exact' if not change else f'rounded by {change:.2g} at the most'
    notes.append(f'vision     {target.mmproj}, {exact}')
  modelfile = path.with_name(ollama.FILE)
  with atomic.whole_file(modelfile) as temporary:
    temporary.write_text(
        ollama.modelfile(
            path.name, checkpoint.tokenizer, mmproj and mmproj.name
        ), encoding='utf-8',
    )
  return Written((*paths, modelfile), num_bytes, tuple(notes))


def _gemma_cpp(checkpoint, path, target, on_piece):
  del target
  # Of sizes that it does not know, gemma.cpp reads all from the file.
  is_custom = checkpoint.config.variant in ('tiny', 'custom')
  num_bytes = gemma_cpp_files.save(path, checkpoint, on_piece, is_custom)
  return Written((path,), num_bytes)


def _huggingface(checkpoint, path, target, on_piece):
  """A folder for transformers, in plain numbers or as W4A16 for vLLM."""
  if target.format == 'w4a16':
    num_bytes = huggingface_out.save_w4a16(
        path, checkpoint, target.scales,
        _DTYPES[target.embedding or 'bf16'], on_piece,
    )
    if 'F16' in num_bytes and target.embedding in (None, 'bf16'):
      return Written((path,), num_bytes, (
          'scales     float16: exact, but what computes in bfloat16 rounds '
          'them; training with config.quant.bf16_safe_scales avoids that',
      ))
    return Written((path,), num_bytes)
  dtype = _DTYPES[target.format or 'bf16']
  return Written(
      (path,), huggingface_out.save(path, checkpoint, dtype, on_piece)
  )


def _mlx(checkpoint, path, target, on_piece):
  return Written(
      (path,), mlx_files.save(path, checkpoint, target.scales, on_piece)
  )


def _orbax(checkpoint, path, target, on_piece):
  dtype = 'float32' if target.format == 'f32' else 'bfloat16'
  gemma_files.save(path, checkpoint, dtype, on_piece)
  return Written((path,), _bytes(checkpoint, dtype))


def _bytes(checkpoint, dtype):
  """Bytes of tensors, all of the text model in one dtype."""
  size = {'float32': 4}.get(dtype, 2)
  count = sum(
      math.prod(e.shape) for e in checkpoint.weights.entries.values()
  )
  found = {dtype: size * count}
  if checkpoint.vision is not None:
    found['vision'] = sum(
        e.num_bytes for e in checkpoint.vision.weights.entries.values()
    )
  return found


def _lm_studio(folder, name, target):
  """LM Studio lists PUBLISHER/MODEL/FILE.gguf below its models folder."""
  if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9._-]*', target.publisher):
    raise errors.UserError(
        f'The publisher {target.publisher!r} becomes a folder: give letters, '
        'digits, dots and dashes.'
    )
  model = folder / target.publisher / f'{name}-GGUF'
  atomic.make_folder(model)
  return model / f'{name}{"-" + target.format if target.format else ""}.gguf'


_DTYPES = {'bf16': 'bfloat16', 'f16': 'float16', 'f32': 'float32'}
_AS_THEY_ARE = dict.fromkeys(_DTYPES)
_FLOAT_CHOICES = {'f16': 'float', 'bf16': 'float', 'f32': 'float'}

LAYOUTS: dict[str, Layout] = {
    'gguf': Layout(
        {'q4_0': 'q4_0', 'q8_0': 'q8_0', **_FLOAT_CHOICES},
        {'q4_0': 'q4_0', 'q8_0': 'q8_0', 'q6_k': 'float', **_FLOAT_CHOICES},
        'q8_0', _gguf,
    ),
    'huggingface': Layout(
        {**_AS_THEY_ARE, 'w4a16': 'q4_0'}, _AS_THEY_ARE, None, _huggingface
    ),
    'mlx': Layout(
        {'q4_0': 'q4_0', 'q8_0': 'q8_0'}, {'q4_0': 'q4_0', 'q8_0': 'q8_0'},
        'q8_0', _mlx,
    ),
    'orbax': Layout({'bf16': None, 'f32': None}, {}, None, _orbax),
    'gemma_cpp': Layout({}, {}, None, _gemma_cpp),
}
