"""Malformed files and folders are read or refused in one line, nothing else."""

import json
import os
import pathlib
import random
import signal

import hypothesis
from hypothesis import strategies as st
import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import gguf_files
from gemma_qat.checkpoints import huggingface
from gemma_qat.checkpoints import orbax_arrays
from tests.checkpoints import malformed_changes
from tests.checkpoints import malformed_samples

# Longer is a hang. What it interrupts is Python; native code is watched by
# the processes of malformed_sizes_test.
_SECONDS = 20


@pytest.fixture(scope='module', params=list(malformed_samples.SAMPLES))
def sample(request, tmp_path_factory):
  """A reader and the folder of its valid checkpoint."""
  folder = tmp_path_factory.mktemp('samples').resolve() / request.param
  folder.mkdir()
  found = malformed_samples.SAMPLES[request.param]
  found.make(folder)
  return found, folder


@pytest.fixture
def folder(tmp_path):
  """A Hugging Face folder."""
  malformed_samples.SAMPLES['huggingface'].make(tmp_path)
  return tmp_path / 'model'


@pytest.fixture(autouse=True)
def alarm():
  def ring(number, frame):
    raise TimeoutError(f'a reader hung for {_SECONDS} seconds')
  previous = signal.signal(signal.SIGALRM, ring)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, previous)


def test_the_samples_themselves_are_read(sample):
  assert malformed_samples.outcome(*sample) == 'read'


def test_changes_are_read_or_refused_in_one_line(sample):
  """By hypothesis, the same examples every time."""
  outcomes = []

  @hypothesis.settings(
      derandomize=True, deadline=None, max_examples=40, database=None,
      suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(rng=st.randoms(use_true_random=False))
  def check(rng):
    signal.alarm(_SECONDS)
    outcomes.append(malformed_samples.changed_outcome(*sample, rng))
    signal.alarm(0)

  check()
  assert 'refused' in outcomes


def test_every_change_is_undone(sample):
  _, folder = sample
  before = _contents(folder)
  for seed in range(30):
    with malformed_changes.changed(folder, random.Random(seed)):
      pass
  assert _contents(folder) == before


@pytest.mark.parametrize('make', [
    os.mkfifo, os.mkdir, lambda p: p.symlink_to(p),
    lambda p: p.symlink_to('/dev/zero'), lambda p: p.write_bytes(b''),
    lambda p: p.write_bytes(b'\x80\x04cos\nsystem\n(S"true"\ntR.'),
], ids=['pipe', 'folder', 'loop', 'device', 'empty', 'pickle'])
def test_what_is_no_model_is_refused_without_waiting(tmp_path, make):
  path = tmp_path / 'model.gguf'
  make(path)
  for load in (detect.load, gguf_files.load):
    signal.alarm(_SECONDS)
    with pytest.raises(errors.UserError, match='model.gguf'):
      load(path)


@pytest.mark.parametrize('name', ['a\0b', 'x' * 5000, ''])
def test_names_that_no_file_can_have_are_refused(name, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.UserError):
    detect.load(name)


@pytest.mark.parametrize('name', [
    'config.json', 'tokenizer.model', 'tokenizer_config.json',
    'generation_config.json', 'chat_template.jinja', 'added_tokens.json',
    'model.safetensors.index.json', 'model-00001-of-00002.safetensors',
])
def test_a_pipe_in_a_folder_is_not_waited_for(folder, name):
  if (folder / name).exists():
    (folder / name).unlink()
  os.mkfifo(folder / name)
  signal.alarm(_SECONDS)
  with pytest.raises(errors.UserError, match='no regular file'):
    huggingface.load(folder)


@pytest.mark.parametrize('name', ['chat_template.jinja',
                                  'generation_config.json'])
def test_no_private_file_is_copied_through_a_link(folder, name, tmp_path):
  private = tmp_path / 'private'
  private.write_text('{"key": "secret"}')
  (folder / name).unlink(missing_ok=True)
  (folder / name).symlink_to(private)
  with pytest.raises(errors.UserError, match='link out of its folder'):
    huggingface.load(folder)


def test_links_of_hugging_faces_cache_are_followed(folder, tmp_path):
  blobs, snapshot = tmp_path / 'blobs', tmp_path / 'snapshots' / 'abc'
  blobs.mkdir()
  snapshot.mkdir(parents=True)
  for i, path in enumerate(sorted(folder.iterdir())):
    path.rename(blobs / str(i))
    (snapshot / path.name).symlink_to(f'../../blobs/{i}')
  loaded = huggingface.load(snapshot)
  assert len(loaded.weights['final_norm']) == loaded.config.embed_dim
  assert 'generation_config.json' in loaded.extras


@pytest.mark.parametrize('name', [
    '../x.safetensors', '/x.safetensors', '..', 'a\0.safetensors',
    'config.json', 'a/b.safetensors', '',
])
def test_shards_lie_in_their_folder(folder, name):
  path = folder / 'model.safetensors.index.json'
  index = json.loads(path.read_text())
  first = next(iter(index['weight_map']))
  index['weight_map'][first] = name
  path.write_text(json.dumps(index))
  with pytest.raises(errors.UserError, match='names files elsewhere'):
    huggingface.load(folder)


def test_orbax_folders_hold_no_links_out_of_them(tmp_path):
  malformed_samples.SAMPLES['gemma_zarr'].make(tmp_path)
  chunk = next(
      p for p in sorted((tmp_path / 'model').rglob('0.0')) if p.is_file()
  )
  chunk.rename(tmp_path / 'elsewhere')
  chunk.symlink_to(tmp_path / 'elsewhere')
  with pytest.raises(errors.UserError, match='link out of its folder'):
    orbax_arrays.open_tree(tmp_path / 'model')


def test_chunks_that_may_claim_any_size_are_refused(tmp_path):
  path = tmp_path / 'model'
  malformed_samples.SAMPLES['gemma_zarr'].make(tmp_path)
  for said in sorted(path.rglob('.zarray')):
    contents = json.loads(said.read_text())
    said.write_text(json.dumps(contents | {'compressor': {
        'id': 'blosc', 'cname': 'lz4', 'clevel': 5, 'shuffle': 1,
    }}))
  with pytest.raises(errors.UserError, match='compressed by blosc'):
    orbax_arrays.open_tree(path)


def test_messages_are_one_printable_line_of_bounded_length():
  error = errors.UserError('a\nb\x1b[31m\ud800\u2581' + 'x' * 10_000)
  assert str(error).startswith(r'a\nb\x1b[31m\ud800' + '\u2581x')
  assert str(error).isprintable() and len(str(error)) <= 2_000


def _contents(folder: pathlib.Path):
  return {
      p: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()
  }
