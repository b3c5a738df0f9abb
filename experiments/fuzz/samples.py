"""Which small valid files does the fuzzing of each reader start from?

The models have one layer where a layout allows it: the number of inputs in an
hour is what finds mistakes. Each function fills an empty folder.
"""

import dataclasses
import json
import pathlib
import shutil
import zlib

from flax import traverse_util
from orbax.checkpoint import v1 as ocp
import tensorstore as ts

from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import export
from gemma_qat.checkpoints import huggingface_out
from gemma_qat.checkpoints import layouts
from gemma_qat.checkpoints import orbax_files
from gemma_qat.checkpoints import random_weights
from gemma_qat.checkpoints import sums
from gemma_qat.data import chat
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.model import config as model_config
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import lattice
from tests.checkpoints import malformed_samples

_RUN = pathlib.Path(__file__).parents[1] / 'results' / 'gemma3_270m_cpu'
_TEXT = 'What is said here is long enough to be a document of a source. ' * 4


def gguf(folder: pathlib.Path) -> None:
  """Q4_0 and Q8_0; bfloat16 with a vision tower beside."""
  for name, has_vision, number_format, embedding in (
      ('q4_0', False, 'q4_0', 'q8_0'), ('bf16', True, 'bf16', 'f16'),
  ):
    (folder / name).mkdir()
    export.convert(
        tiny(has_vision), folder / name / 'model.gguf',
        layouts.Target(format=number_format, embedding=embedding, mmproj='f16'),
    )


def huggingface(folder: pathlib.Path) -> None:
  """Shards: with a tokenizer.model, and with a tower and tokenizer.json."""
  for name, has_vision in (('text', False), ('seeing', True)):
    huggingface_out.save(
        folder / name, tiny(has_vision), 'bfloat16', shard_bytes=2**14
    )
    if has_vision:
      (folder / name / 'tokenizer.model').unlink()


def tokenizer_json(folder: pathlib.Path) -> None:
  """What stands beside weights: with a tokenizer.model, and without."""
  huggingface_out.save(folder / 'with', tiny(), 'bfloat16')
  for path in list((folder / 'with').iterdir()):
    if 'safetensors' in path.name:
      path.unlink()
  shutil.copytree(folder / 'with', folder / 'without')
  (folder / 'without' / 'tokenizer.model').unlink()
  for name in ('with', 'without'):
    (folder / name / 'added_tokens.json').write_text('{"<new>": 361}')
  (folder / 'with' / 'chat_template.jinja').write_text(chat.TEMPLATE)
  (folder / 'without' / 'chat_template.json').write_text(
      json.dumps({'chat_template': chat.TEMPLATE})
  )


def tokenizer_model(folder: pathlib.Path) -> None:
  """SentencePiece alone."""
  (folder / 'tokenizer.model').write_bytes(
      tokenizers.tiny_tokenizer(361).to_proto()
  )


def stored_tokenizer(folder: pathlib.Path) -> None:
  """As our steps hold it, and what it is before it is compressed."""
  data = tokenizers.tiny_tokenizer(361).to_bytes()
  (folder / 'tokenizer.bin').write_bytes(data)
  (folder / 'tokenizer.json').write_bytes(
      zlib.decompress(data[len(malformed_samples.MAGIC) :])
  )


def configs(folder: pathlib.Path) -> None:
  """A run's own files, and those of a Hugging Face model that hold settings."""
  (folder / 'run').mkdir()
  for name in ('config.json', 'report.json', 'metrics.jsonl'):
    shutil.copy(_RUN / name, folder / 'run' / name)
  (folder / 'run' / 'revision.json').write_text(json.dumps(
      {'git': 'a' * 40, 'python': '3.11', 'devices': 1, 'jax': '0.1'}
  ))
  rows = (folder / 'run' / 'metrics.jsonl').read_text().splitlines()
  # The first ones have every kind of row.
  (folder / 'run' / 'metrics.jsonl').write_text('\n'.join(rows[:12]) + '\n')
  huggingface_out.save(folder / 'model', tiny(True), 'bfloat16')
  for path in list((folder / 'model').iterdir()):
    if path.name not in ('config.json', 'generation_config.json'):
      path.unlink()


def text(folder: pathlib.Path) -> None:
  """Lines of text and of chats, a plain text, a template."""
  tokens = tiny().tokenizer.encode('The').tolist()
  said = [{'role': 'system', 'content': 'Be brief.'},
          {'role': 'user', 'content': [{'type': 'text', 'text': 'Why?'}]},
          {'role': 'assistant', 'content': 'So.'}]
  lines = {
      'jsonl.jsonl': [{'text': _TEXT},
                      {'text': 'The', 'gemma_tokens': tokens}],
      'chat.jsonl': [{'messages': said}, {'messages': said[1:]}],
  }
  for name, records in lines.items():
    (folder / name).write_text(''.join(f'{json.dumps(r)}\n' for r in records))
  (folder / 'files.txt').write_text(_TEXT)
  (folder / 'template.jinja').write_text(chat.TEMPLATE)


def orbax(folder: pathlib.Path) -> None:
  """A step of ours, as Orbax writes now, and in folders of zarr."""
  one = tiny()
  plan = malformed_samples.plan_of_modes(one.config)
  tree = model_weights.stack(one.config, dict(one.weights))
  student = _walk(tree, '', lambda path, weight: (
      weight if path not in plan or plan[path].mode == 'derived'
      else lattice.init_node(weight, *plan[path])
  ))
  trees = {
      'student': student,
      'tokenizer': orbax_files.tokenizer_tree(one.tokenizer),
  }
  with orbax_files.context():
    ocp.save_checkpointables(folder / 'ocdbt' / '7', {
        'manifest': orbax_files.sealed(
            orbax_files.manifest(one.config, plan, 7, 'fuzzed'),
            {name: {
                path: sums.of(leaf) for path, leaf
                in traverse_util.flatten_dict(tree, sep='/').items()
            } for name, tree in trees.items()},
        ),
        **trees,
    })
  malformed_samples.SAMPLES['orbax_zarr'].make(folder / 'zarr')


def google(folder: pathlib.Path) -> None:
  """As the gemma library's checkpoints are: OCDBT, and two kinds of zarr."""
  for name in ('gemma', 'gemma_zarr', 'gemma_zarr3'):
    (folder / name).mkdir()
    malformed_samples.SAMPLES[name].make(folder / name)
  _uncompressed(folder / 'gemma' / 'model', folder / 'plain' / 'model')


def tiny(has_vision: bool = False) -> checkpoints.Checkpoint:
  """One layer of blocks of 32, the smallest vocabulary there is."""
  config = dataclasses.replace(
      model_config.variant('tiny'), variant='custom', num_layers=1,
      embed_dim=32, mlp_dim=32, num_heads=1, num_kv_heads=1, head_dim=32,
      query_scale_dim=32.0, vocab_size=361,
  )
  tower = None
  if has_vision:
    tower = random_weights.load('random:tiny+vision').vision.config
    tower = dataclasses.replace(tower, num_layers=1, text_dim=32)
  return random_weights.make(
      config, tower, tokenizers.tiny_tokenizer(config.vocab_size)
  )


def _walk(tree, path, change):
  if isinstance(tree, dict):
    return {
        key: _walk(value, f'{path}/{key}'.lstrip('/'), change)
        for key, value in tree.items()
    }
  return change(path, tree)


def _uncompressed(source, to):
  """Copies OCDBT so that changes of its nodes are not lost in zstd."""
  shutil.copytree(
      source, to, ignore=shutil.ignore_patterns('d', 'manifest.ocdbt')
  )
  open_ = lambda folder, **kw: ts.KvStore.open({
      'driver': 'ocdbt', 'base': f'file://{folder}/', **kw
  }).result()
  old, new = open_(source), open_(to, config={'compression': None})
  with ts.Transaction() as transaction:
    for key in old.list().result():
      new.with_transaction(transaction)[key] = old[key]
