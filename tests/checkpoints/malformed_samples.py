"""Which small valid checkpoints does the fuzzing of the readers start from?

One sample a reader: a folder, what of it the reader is given, and how it reads
everything that the fuzzing may have changed.
"""

from collections.abc import Callable
import pathlib
import re
import resource
import zlib
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as legacy
from orbax.checkpoint import v1 as ocp

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import export
from gemma_qat.checkpoints import gemma_cpp_files
from gemma_qat.checkpoints import gemma_files
from gemma_qat.checkpoints import gguf_files
from gemma_qat.checkpoints import huggingface
from gemma_qat.checkpoints import huggingface_out
from gemma_qat.checkpoints import layouts
from gemma_qat.checkpoints import orbax_files
from gemma_qat.checkpoints import random_weights
from gemma_qat.checkpoints import regular_files
from gemma_qat.checkpoints import sbs_blobs
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import formats
from gemma_qat.quant import lattice
from tests.checkpoints import malformed_changes

MOST_LETTERS = 2_000
# What stored tokenizers begin with.
MAGIC = b'gemma-qat tokenizer 1\n'
GIB = 2**30


class Sample(NamedTuple):
  """make: fills an empty folder. path: in it, given to `read`."""

  make: Callable[[pathlib.Path], None]
  path: str
  read: Callable[[pathlib.Path], Any]


def outcome(sample: Sample, folder: pathlib.Path) -> str:
  """Returns 'read', or 'refused' by an error as it has to be.

  Raises:
    Exception: whatever else the reader raised; AssertionError for an error
      that is no single line.
  """
  try:
    with np.errstate(all='ignore'):
      sample.read(folder / sample.path)
  except errors.UserError as error:
    message = str(error)
    assert message.isprintable() and 0 < len(message) <= MOST_LETTERS, message
    return 'refused'
  return 'read'


def changed_outcome(sample: Sample, folder: pathlib.Path, rng: Any) -> str:
  """Changes something in a folder, reads it, and puts it right again."""
  with malformed_changes.changed(folder, rng):
    return outcome(sample, folder)


def limit_memory() -> None:
  """Refuses this process more than 1 GiB on top of what it has.

  What it has written to or could: what is only mapped from files is free.
  """
  status = pathlib.Path('/proc/self/status').read_text()
  now = 1024 * int(re.search(r'VmData:\s+(\d+) kB', status)[1])
  resource.setrlimit(resource.RLIMIT_DATA, (now + GIB, now + GIB))


def _read_all(load):
  """Makes a reader of `load`: header, tokenizer and every weight."""
  def read(path):
    checkpoint = load(path)
    checkpoints.dequantized(checkpoint)
    if checkpoint.vision is not None:
      for name in checkpoint.vision.weights:
        for _ in checkpoint.vision.weights.pieces(name):
          pass
    if checkpoint.tokenizer is not None:
      _use(checkpoint.tokenizer)
    layouts.model_name(checkpoint)
  return read


def _read_sbs(path):
  for _, blob in gemma_cpp_files.read_tensors(path).values():
    for _ in sbs_blobs.chunks(path, blob):
      pass


def _gguf(folder):
  """Q4_0 matrices, Q8_0 embedding, a vision tower beside."""
  export.convert(
      random_weights.load('random:tiny+vision:1'), folder / 'model.gguf',
      layouts.Target(format='q4_0', embedding='q8_0', mmproj='f16'),
  )


def _huggingface(folder):
  """A vision tower, two shards, every file that a tokenizer may have."""
  seeing = random_weights.load('random:tiny+vision:1')
  huggingface_out.save(folder / 'model', seeing, 'bfloat16', shard_bytes=2**19)


def _huggingface_json(folder):
  """The tokenizer from tokenizer.json alone, one file of weights."""
  tiny = random_weights.load('random:tiny:1')
  huggingface_out.save(folder / 'model', tiny, 'bfloat16')
  (folder / 'model' / 'tokenizer.model').unlink()


def _gemma(folder):
  seeing = random_weights.load('random:tiny+vision:1')
  gemma_files.save(folder / 'model', seeing, 'bfloat16')


def _gemma_zarr(folder, is_zarr3):
  """As Orbax stored without OCDBT: JSON and chunks of each array."""
  source = folder / 'source'
  gemma_files.save(source, random_weights.load('random:tiny:1'), 'bfloat16')
  with legacy.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(source)
  tokenizer = (source / 'tokenizer.model').read_bytes()
  malformed_changes.remove(source)
  handler = legacy.PyTreeCheckpointHandler(
      use_ocdbt=False, use_zarr3=is_zarr3
  )
  with legacy.Checkpointer(handler) as checkpointer:
    checkpointer.save(folder / 'model', tree)
  (folder / 'model' / 'tokenizer.model').write_bytes(tokenizer)


def plan_of_modes(config) -> dict[str, lattice.Entry]:
  """A plan in which three kinds of matrices are q4_0, each in another mode."""
  modes = {'attn_q': 'codes', 'attn_o': 'learned', 'mlp_up': 'derived'}
  return {
      path: lattice.Entry(
          formats.get('q4_0'), modes[path.split('/')[-1]], s.contraction
      )
      for path, s in model_weights.tree_specs(config).items()
      if path.split('/')[-1] in modes
  }


def _step(folder):
  """A step of ours with every mode of a quantized weight."""
  tiny = random_weights.load('random:tiny:1')
  plan = plan_of_modes(tiny.config)
  flat = model_weights.stack(tiny.config, dict(tiny.weights))
  student = {
      'embedding': flat['embedding'], 'final_norm': flat['final_norm'],
      **{
          part: {
              layer: {
                  kind: _node(plan.get(f'{part}/{layer}/{kind}'), weight)
                  for kind, weight in weights.items()
              }
              for layer, weights in flat[part].items()
          }
          for part in ('groups', 'tail')
      },
  }
  with orbax_files.context():
    ocp.save_checkpointables(folder / '7', {
        'student': student,
        'manifest': orbax_files.manifest(tiny.config, plan, 7, 'fuzzed'),
        'tokenizer': orbax_files.tokenizer_tree(tiny.tokenizer),
    })


def _step_zarr(folder):
  """The same, its arrays in folders of their own, which no checksum guards."""
  _step(folder)
  tiny = random_weights.load('random:tiny:1')
  tree = model_weights.stack(tiny.config, dict(tiny.weights))
  handler = legacy.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)
  step = folder / '7'
  trees = {
      'student': tree,
      'tokenizer': orbax_files.tokenizer_tree(tiny.tokenizer),
  }
  for name, contents in trees.items():
    malformed_changes.remove(step / name)
    with legacy.Checkpointer(handler) as checkpointer:
      checkpointer.save(step / name, contents)
  path = step / 'manifest' / 'data.json'
  path.write_text(path.read_text().replace('"quant": {', '"was": {'))
  path.write_text(path.read_text()[:-1] + ', "quant": {}}')


def _node(entry, weight):
  if entry is None or entry.mode == 'derived':
    return weight
  return lattice.init_node(weight, *entry)


def _sbs(folder):
  gemma_cpp_files.save(
      folder / 'model.sbs', random_weights.load('random:tiny+vision:1'),
      custom=True,
  )


def _proto(folder):
  (folder / 'tokenizer.model').write_bytes(
      tokenizers.tiny_tokenizer().to_proto()
  )


def _read_proto(path):
  _use(tokenizers.from_proto(_bytes(path)))


def _fields(folder):
  """What our own steps hold of a tokenizer, before it is compressed."""
  data = tokenizers.tiny_tokenizer().to_bytes()
  (folder / 'tokenizer.json').write_bytes(zlib.decompress(data[len(MAGIC) :]))


def _read_fields(path):
  _use(tokenizers.from_bytes(MAGIC + zlib.compress(_bytes(path), 1)))


def _bytes(path):
  return regular_files.read_bytes(path, 2**24)


def _use(tokenizer):
  ids = tokenizer.encode('<bos>The  end.\n\0', bos=True, specials=True)
  tokenizer.decode(ids)
  assert tokenizer.to_proto() and tokenizer.to_bytes() and tokenizer.digest


SAMPLES = {
    'gguf': Sample(_gguf, 'model.gguf', _read_all(gguf_files.load)),
    'huggingface': Sample(
        _huggingface, 'model', _read_all(huggingface.load)
    ),
    'tokenizer_json': Sample(
        _huggingface_json, 'model', _read_all(huggingface.load)
    ),
    'gemma': Sample(_gemma, 'model', _read_all(gemma_files.load)),
    'gemma_zarr': Sample(
        lambda folder: _gemma_zarr(folder, False), 'model',
        _read_all(gemma_files.load),
    ),
    'gemma_zarr3': Sample(
        lambda folder: _gemma_zarr(folder, True), 'model',
        _read_all(gemma_files.load),
    ),
    'orbax': Sample(_step, '.', _read_all(orbax_files.load)),
    'orbax_zarr': Sample(_step_zarr, '.', _read_all(orbax_files.load)),
    'proto': Sample(_proto, 'tokenizer.model', _read_proto),
    'stored_tokenizer': Sample(_fields, 'tokenizer.json', _read_fields),
    'sbs': Sample(_sbs, 'model.sbs', _read_sbs),
    'detect_file': Sample(_gguf, 'model.gguf', _read_all(detect.load)),
    'detect_folder': Sample(_huggingface, 'model', _read_all(detect.load)),
}
