"""Which readers are fuzzed, from which small valid files, and how far?

Each reads what the commands would: headers, metadata and tokenizer, and two
tensors of the model. The models have one layer where a layout allows it, for
the number of inputs in an hour is what finds mistakes.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import json
import pathlib
import shutil
import zlib
from typing import Any, NamedTuple

from flax import traverse_util
import ml_collections
import numpy as np
from orbax.checkpoint import v1 as ocp
import tensorstore as ts

from gemma_qat import errors
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import export
from gemma_qat.checkpoints import huggingface_config
from gemma_qat.checkpoints import huggingface_json
from gemma_qat.checkpoints import huggingface_out
from gemma_qat.checkpoints import huggingface_tokenizer
from gemma_qat.checkpoints import layouts
from gemma_qat.checkpoints import orbax_files
from gemma_qat.checkpoints import random_weights
from gemma_qat.checkpoints import regular_files
from gemma_qat.checkpoints import sums
from gemma_qat.commands import run_folders
from gemma_qat.data import chat
from gemma_qat.data import sources
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.model import config as model_config
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import formats
from gemma_qat.quant import lattice
from gemma_qat.quant import rules
from gemma_qat.reporting import comparison
from gemma_qat.reporting import page
from gemma_qat.reporting import points
from gemma_qat.training import workdir
from tests.checkpoints import malformed_samples

_RUN = pathlib.Path(__file__).parents[1] / 'results' / 'gemma3_270m_cpu'
_TEXT = 'What is said here is long enough to be a document of a source. ' * 4


class Target(NamedTuple):
  """make: fills an empty folder. read: takes the file in it that was damaged.

  is_changed: which files are damaged. is_replaced: whether a pipe, a device or
  a link may come into their places.
  """

  make: Callable[[pathlib.Path], None]
  read: Callable[[pathlib.Path], Any]
  is_changed: Callable[[pathlib.Path], bool] = lambda path: True
  is_replaced: bool = True


def _tiny(has_vision=False):
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


def _open(path):
  """Opens a model as every command does, and reads two tensors of each part."""
  checkpoint = detect.load(path)
  weights = checkpoint.weights
  for name in list(weights)[:2]:
    rules.check_finite(name, _values(weights[name]))
  if checkpoint.vision is not None:
    for name in list(checkpoint.vision.weights)[:2]:
      _values(checkpoint.vision.weights[name])
  if checkpoint.tokenizer is not None:
    checkpoint.tokenizer.decode(
        checkpoint.tokenizer.encode('<bos>The  end.\n\0', specials=True)
    )
  layouts.model_name(checkpoint)


def _values(weight):
  if isinstance(weight, tuple):
    codes, scale = weight.quantized
    np.asarray(codes)
    return np.asarray(scale)
  return np.asarray(weight)


def _gguf(folder):
  for name, has_vision, number_format, embedding in (
      ('q4_0', False, 'q4_0', 'q8_0'), ('bf16', True, 'bf16', 'f16'),
  ):
    (folder / name).mkdir()
    export.convert(
        _tiny(has_vision), folder / name / 'model.gguf',
        layouts.Target(format=number_format, embedding=embedding, mmproj='f16'),
    )


def _huggingface(folder):
  for name, has_vision in (('text', False), ('seeing', True)):
    huggingface_out.save(
        folder / name, _tiny(has_vision), 'bfloat16', shard_bytes=2**14
    )
    if has_vision:
      (folder / name / 'tokenizer.model').unlink()


def _tokenizer_json(folder):
  """What stands beside weights: with a tokenizer.model, and without."""
  huggingface_out.save(folder / 'with', _tiny(), 'bfloat16')
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


def _read_tokenizer(path):
  tokenizer = huggingface_tokenizer.load(path.parent)
  if tokenizer is not None:
    _use(tokenizer)


def _use(tokenizer):
  ids = tokenizer.encode('<bos>The  end.\n\0', bos=True, specials=True)
  tokenizer.decode(ids)
  assert tokenizer.to_proto() and tokenizer.to_bytes() and tokenizer.digest


def _tokenizer_model(folder):
  (folder / 'tokenizer.model').write_bytes(
      tokenizers.tiny_tokenizer(361).to_proto()
  )


def _stored_tokenizer(folder):
  data = tokenizers.tiny_tokenizer(361).to_bytes()
  (folder / 'tokenizer.bin').write_bytes(data)
  (folder / 'tokenizer.json').write_bytes(
      zlib.decompress(data[len(malformed_samples.MAGIC) :])
  )


def _read_stored(path):
  data = regular_files.read_bytes(path, regular_files.LARGEST_TOKENIZER)
  if path.suffix == '.json':
    data = malformed_samples.MAGIC + zlib.compress(data, 1)
  _use(tokenizers.from_bytes(data))


def _configs(folder):
  """A run's own files, and those of a Hugging Face model that hold settings."""
  (folder / 'run').mkdir()
  for name in ('config.json', 'report.json', 'metrics.jsonl'):
    shutil.copy(_RUN / name, folder / 'run' / name)
  rows = (folder / 'run' / 'metrics.jsonl').read_text().splitlines()
  # The first ones have every kind of row.
  (folder / 'run' / 'metrics.jsonl').write_text('\n'.join(rows[:12]) + '\n')
  huggingface_out.save(folder / 'model', _tiny(True), 'bfloat16')
  for path in list((folder / 'model').iterdir()):
    if path.name not in ('config.json', 'generation_config.json'):
      path.unlink()


def _read_configs(path):
  if path.parent.name == 'run':
    groups = points.group(run_folders.collect([path.parent]))
    made = comparison.make(groups)
    comparison.render_markdown(made, {})
    page.render(made, {})
    with contextlib.suppress(errors.UserError):
      # It is another config: refused, whatever the file says.
      workdir.is_begun(path.parent, _CONFIG)
  elif path.name == 'config.json':
    said = huggingface_tokenizer.read_json(path)
    config = huggingface_config.read(said, str(path), 361)
    huggingface_config.read_vision(said, str(path), config.embed_dim)
  else:
    regular_files.read_json(path)
    huggingface_json.sampling(dataclasses.replace(
        _MODEL, extras={path.name: regular_files.read_bytes(path, 2**20)}
    ))


_CONFIG = ml_collections.ConfigDict({'name': 'other', 'mesh': {'fsdp': 2}})
_MODEL = _tiny()


def _text(folder):
  tokens = _MODEL.tokenizer.encode('The').tolist()
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


def _read_text(path):
  if path.suffix == '.jinja':
    chat.template(str(path))
  else:
    documents = sources.load(f'{path.stem}:{path}')
    sources.encode(documents, _MODEL.tokenizer)


def _orbax(folder):
  """A step of ours, as Orbax writes now, and in folders of zarr."""
  one = _tiny()
  specs = model_weights.tree_specs(one.config)
  modes = {'attn_q': 'codes', 'attn_o': 'learned', 'mlp_up': 'derived'}
  plan = {
      path: lattice.Entry(
          formats.get('q4_0'), modes[path.split('/')[-1]], s.contraction
      )
      for path, s in specs.items() if path.split('/')[-1] in modes
  }
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


def _walk(tree, path, change):
  if isinstance(tree, dict):
    return {
        key: _walk(value, f'{path}/{key}'.lstrip('/'), change)
        for key, value in tree.items()
    }
  return change(path, tree)


def _google(folder):
  """As the gemma library's checkpoints are: OCDBT, and two kinds of zarr."""
  for name in ('gemma', 'gemma_zarr', 'gemma_zarr3'):
    (folder / name).mkdir()
    malformed_samples.SAMPLES[name].make(folder / name)
  _uncompressed(folder / 'gemma' / 'model', folder / 'plain' / 'model')


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


def _is_sampled(path):
  """All that is not in the folder of an array, and the arrays of a layer."""
  return not path.parent.name.count('.') or '.layer_0.' in path.parent.name


def _top(depth):
  """Opens the folder so many levels below that of the target."""
  def read(path):
    # The folder of the target is called 'sample'.
    while len(path.parts) - 1 - path.parts.index('sample') > depth:
      path = path.parent
    _open(path)
  return read


def _read_resumed(path):
  """As training goes on from a step: by Orbax's own readers."""
  while path.parent.name != 'ocdbt':
    path = path.parent
  with contextlib.suppress(errors.UserError):
    # The former, too, reads what the latter says is not what was saved.
    orbax_files.verify(path)
  orbax_files.load_manifest(path)
  orbax_files.load_tree(path, 'student')


def _read_gguf(path):
  _open(path.with_name('model.gguf'))


TARGETS = {
    'gguf': Target(_gguf, _read_gguf, lambda p: p.suffix == '.gguf'),
    'huggingface': Target(_huggingface, _top(1)),
    'tokenizer_json': Target(_tokenizer_json, _read_tokenizer),
    'tokenizer_model': Target(
        _tokenizer_model,
        lambda path: _use(tokenizers.from_proto(
            regular_files.read_bytes(path, regular_files.LARGEST_TOKENIZER)
        )),
    ),
    'stored_tokenizer': Target(_stored_tokenizer, _read_stored),
    'configs': Target(_configs, _read_configs),
    # A pipe of text is what a user may name: it is waited for.
    'text': Target(_text, _read_text, is_replaced=False),
    'orbax': Target(_orbax, _top(1), _is_sampled),
    'orbax_resumed': Target(
        _orbax, _read_resumed, lambda p: 'ocdbt' in p.parts
    ),
    'google': Target(_google, _top(2), _is_sampled),
    'sbs': Target(
        malformed_samples.SAMPLES['sbs'].make, malformed_samples.SAMPLES[
            'sbs'
        ].read,
    ),
}


def outcome(target: Target, path: pathlib.Path) -> str:
  """Returns 'read' or 'refused'; raises what no reader may raise."""
  return malformed_samples.outcome(
      malformed_samples.Sample(target.make, '', target.read), path
  )
