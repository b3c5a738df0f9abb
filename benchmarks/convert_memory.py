"""Claim: a model of any size is converted within 4 GB of memory.

Makes a Hugging Face folder with the real tensors of a size (bfloat16, sparse
files: they take no disk until written), converts it and watches the process's
anonymous memory, which is all but the page cache. One line of JSON:

  python benchmarks/convert_memory.py --size=27b --layout=gguf --format=q4_0

The output is real: 27b as Q4_0 takes 16 GB of disk while it runs.
"""

import argparse
import json
import pathlib
import shutil
import tempfile
import threading
import time

from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import export
from gemma_qat.checkpoints import huggingface_config
from gemma_qat.checkpoints import layouts
from gemma_qat.checkpoints import names
from gemma_qat.model import config as model_config
from gemma_qat.model import vision as vision_config
from gemma_qat.model import weights

_BFLOAT16 = 2


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--size', default='1b')
  parser.add_argument('--layout', default='gguf')
  parser.add_argument('--format')
  parser.add_argument('--embedding')
  parser.add_argument('--folder', default=tempfile.gettempdir())
  a = parser.parse_args()
  config = model_config.variant(a.size)
  with tempfile.TemporaryDirectory(dir=a.folder) as folder:
    folder = pathlib.Path(folder)
    size = write_sparse(folder / 'source', config)
    with Watch() as watch:
      checkpoint = detect.load(folder / 'source')
      start, before = time.monotonic(), anonymous_bytes()
      exported = export.convert(
          checkpoint, folder / 'out',
          layouts.Target(a.layout, a.format, a.embedding),
      )
      seconds = time.monotonic() - start
    written = sum(
        p.stat().st_size for p in folder.rglob('*')
        if p.is_file() and 'source' not in p.parts
    )
    shutil.rmtree(folder / 'source')
  print(json.dumps({
      'what': f'{a.size} Hugging Face bf16 -> {a.layout} '
              f'{a.format or ""}'.strip(),
      'device': '2-core CPU',
      'source_gb': round(size / 1e9, 2),
      'written_gb': round(written / 1e9, 2),
      'tensors': exported.num_bytes,
      'peak_anonymous_gb': round(watch.peak / 1e9, 3),
      'before_gb': round(before / 1e9, 3),
      'ratio': round(watch.peak / size, 4),
      'seconds': round(seconds),
  }))


def write_sparse(folder: pathlib.Path, config: model_config.ModelConfig):
  """Writes headers, and no data, of a whole checkpoint; returns its bytes."""
  folder.mkdir()
  specs = weights.by_layer_specs(config)
  shapes = {
      file_name: names.file_shape(specs[name]) for name, file_name in
      names.huggingface(config, 'language_model.model.').items()
  }
  settings = {
      'model_type': 'gemma3_text',
      'text_config': huggingface_config.write(config, 'bfloat16', {}),
  }
  if config.embed_dim >= model_config.variant('4b').embed_dim:
    tower = vision_config.VisionConfig(config.embed_dim)
    file_names = names.vision(tower)
    shapes |= {
        file_names[n].huggingface: s.shape
        for n, s in vision_config.specs(tower).items()
    }
  (folder / 'config.json').write_text(json.dumps(settings))
  # The vocabulary of the packaged checkpoint is that of every size.
  tokenizer = detect.load(detect.PACKAGED).tokenizer
  (folder / 'tokenizer.model').write_bytes(tokenizer.to_proto())
  header, offset = {}, 0
  for name, shape in shapes.items():
    count = 1
    for axis in shape:
      count *= axis
    end = offset + count * _BFLOAT16
    header[name] = {
        'dtype': 'BF16', 'shape': shape, 'data_offsets': [offset, end]
    }
    offset = end
  text = json.dumps(header).encode()
  path = folder / 'model.safetensors'
  path.write_bytes(len(text).to_bytes(8, 'little') + text)
  with open(path, 'r+b') as f:
    f.truncate(8 + len(text) + offset)
  return offset


class Watch:
  """Keeps the largest anonymous memory that the process had."""

  def __init__(self):
    self.peak = 0
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, *exception):
    self._done.set()
    self._thread.join()

  def _run(self):
    while not self._done.wait(0.02):
      self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
  """Resident memory that no file backs."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('RssAnon:'):
      return 1024 * int(line.split()[1])
  raise OSError('/proc/self/status has no RssAnon: this needs Linux.')


if __name__ == '__main__':
  main()
