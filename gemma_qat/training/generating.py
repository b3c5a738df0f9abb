"""How does a model write the text that its student trains on?

Checkpoint -> prompts -> batches of sequences -> lines of a file. A document is
decided by the seed and its number: a run that was stopped goes on with the
next one, and writes what it would have written.
"""

import dataclasses
import hashlib
import os
import pathlib
import sys
import time
from typing import NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat import errors
from gemma_qat import sharding
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.data import readers
from gemma_qat.model import batch_sampling
from gemma_qat.model import transformer
from gemma_qat.model import weights
from gemma_qat.training import job
from gemma_qat.training import machine
from gemma_qat.training import metrics
from gemma_qat.training import sampled_file
from gemma_qat.training import sampled_text
from gemma_qat.training import stopping


def generate(
    s: sampled_text.Settings,
    path: str | os.PathLike,
    tokens: int | None = None,
    documents: int | None = None,
) -> tuple[int, int]:
  """Writes documents until there are enough of them, or of their tokens.

  The model's matrices are those of a run's teacher: rounded to bfloat16.

  Args:
    s: what the documents depend on.
    path: the file, see `sampled_file`; one that was begun goes on.
    tokens: how many tokens are enough, BOS not counted.
    documents: how many documents are; by default one for each prompt.

  Returns:
    (documents, tokens) of the file.

  Raises:
    UserError: the settings, the model, the prompts or the file do not fit.
    Stopped: on SIGTERM or Ctrl-C, after what is written.
  """
  path = pathlib.Path(path)
  checkpoint = detect.load(s.model)
  tokenizer = checkpoints.tokenizer(checkpoint)
  prompts = sampled_text.prompts(s, tokenizer)
  if tokens is None and documents is None:
    if not s.prompts:
      raise errors.UserError(
          'Say how much is enough: --tokens=1e6 or --documents=1000.'
      )
    documents = len(prompts)
  rules = sampled_text.rules(s, tokenizer)
  mesh = sharding.make_mesh()
  dtype = machine.fast_dtype() if s.dtype == 'auto' else s.dtype
  _check_sizes(checkpoint.config, s, dtype, mesh.size)
  file = sampled_file.SampledFile(path, dataclasses.asdict(s) | {
      'dtype': dtype,
      'tokenizer': tokenizer.digest,
      'prompts_sha256': _digest(prompts),
      'weights_sha256': _digest_of_weights(checkpoint),
  })
  goal = _Goal(documents, tokens)
  if not goal.is_met(file.documents, file.tokens):
    model, params = _network(checkpoint, dtype, mesh)
    sample = batch_sampling.make_sampler(model, rules, mesh)
    with stopping.Signal('these tokens') as stop:
      between = lambda: _check_stop(stop, file)
      _write(s, file, goal, tokenizer, lambda numbers: sample(
          params, [prompts[i % len(prompts)] for i in numbers],
          _keys(s.seed, numbers), between,
      ))
  return file.documents, file.tokens


class _Goal(NamedTuple):
  """How much is enough: whichever is given and reached first."""

  documents: int | None
  tokens: int | None

  def is_met(self, documents: int, tokens: int) -> bool:
    return (self.documents is not None and documents >= self.documents) or (
        self.tokens is not None and tokens >= self.tokens
    )

  def measure(self, file) -> tuple[int, int]:
    """(how far it is, of how much), for a progress bar."""
    if self.documents is None:
      return min(file.tokens, self.tokens), self.tokens
    return file.documents, self.documents


def _write(s, file, goal, tokenizer, sample):
  """Samples batch after batch, sample(numbers of documents), into the file."""
  done, total = goal.measure(file)
  with metrics.Progress('generate', total, done) as progress:
    while not goal.is_met(file.documents, file.tokens):
      begun = time.monotonic()
      # Of a batch that a kill or an earlier end tore, the rest is written.
      first = file.documents // s.batch_size * s.batch_size
      written = [
          sampled_text.trim(ids, s, tokenizer)
          for ids in sample(range(first, first + s.batch_size))
      ]
      if not any(map(len, written)):
        raise errors.UserError(
            f'{s.model} ends every document at once: give --prompts, or '
            'another model.'
        )
      records = []
      tokens = file.tokens
      for ids in written[file.documents - first :]:
        if goal.is_met(file.documents + len(records), tokens):
          break
        records.append({
            'text': tokenizer.decode(ids, specials=True),
            readers.TOKENS: ids.tolist(),
        })
        tokens += len(ids)
      file.append(records)
      rate = sum(map(len, written)) / (time.monotonic() - begun)
      before, (done, _) = done, goal.measure(file)
      progress.advance(done - before, f'{rate:,.0f} tokens/s')


def _check_stop(stop, file):
  if stop.asked:
    raise errors.Stopped(
        f'Stopped after {file.documents} documents; the same command goes on.'
    )


def _keys(seed, numbers) -> jax.Array:
  key = jax.random.key(seed)
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(
      np.asarray(numbers, np.uint32)
  )


def _network(checkpoint, dtype, mesh):
  model = transformer.Transformer(
      checkpoint.config, constrain=sharding.make_constrain(mesh),
      dtype=jnp.dtype(dtype), remat='none',
  )
  params = weights.stack(
      checkpoint.config, checkpoints.dequantized(checkpoint)
  )
  flat = job.teacher_of(
      checkpoint.config, traverse_util.flatten_dict(params, sep='/'), model
  )
  params = traverse_util.unflatten_dict(flat, sep='/')
  return model, jax.device_put(params, sharding.replicated(mesh))


def _check_sizes(config, s, dtype, devices):
  """Says what the cache takes on each device, and refuses what cannot be."""
  if s.batch_size % devices:
    raise errors.UserError(
        f'--batch_size={s.batch_size} does not divide among {devices} devices: '
        'choose a multiple.'
    )
  if s.length > config.context_length:
    raise errors.UserError(
        f'--length={s.length} is more than the model reads: '
        f'{config.context_length} tokens at most.'
    )
  needed = batch_sampling.cache_bytes(
      config, s.batch_size, s.length, dtype=jnp.dtype(dtype)
  ) // devices
  stats = jax.local_devices()[0].memory_stats() or {}
  there = stats.get('bytes_limit')
  if there is None and 'SC_PHYS_PAGES' in getattr(os, 'sysconf_names', ()):
    there = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // devices
  print(
      f'Keys and values of {s.batch_size} x {s.length} tokens: '
      f'{needed / 1e9:.2f} GB on each of {devices} devices, {dtype} products',
      file=sys.stderr, flush=True,
  )
  # A step reads one cache and writes another.
  if there is not None and 2 * needed > there:
    raise errors.UserError(
        f'Keys and values of {s.batch_size} x {s.length} tokens take twice '
        f'{needed / 1e9:,.1f} GB on each device, which has '
        f'{there / 1e9:,.1f} GB: lower --batch_size or --length.'
    )


def _digest(prompts) -> str:
  sha = hashlib.sha256()
  for ids in prompts:
    sha.update(len(ids).to_bytes(8, 'big') + ids.tobytes())
  return sha.hexdigest()


def _digest_of_weights(checkpoint) -> str:
  """Tells apart what one path may hold at two times, by its first weights."""
  sha = hashlib.sha256()
  for name in ('final_norm', 'layer_0/attn_pre_norm', 'layer_0/attn_q'):
    sha.update(np.asarray(
        checkpoints.to_float32(checkpoint.weights[name]), np.float32
    ).tobytes())
  return sha.hexdigest()
