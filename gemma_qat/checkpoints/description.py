"""What is in a checkpoint, at a glance?"""

import collections
import os
from typing import Any

import numpy as np

from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect

_LONG = 60


def describe(
    model: checkpoints.Checkpoint | str | os.PathLike,
) -> dict[str, Any]:
  """Sums up a checkpoint without reading its weights.

  Args:
    model: a checkpoint, or what `detect.load` takes.

  Returns:
    Plain values: source, layout, variant, model (the sizes), tokenizer (None
    or its size), vision (None or its sizes), weights (count), bytes (of the weights), bits_per_weight,
    tensors {type: {count, weights, bytes}}, matrices {kind: {type: count}}
    and metadata, long values shortened.
  """
  if not isinstance(model, checkpoints.Checkpoint):
    model = detect.load(model)
  tensors = {}
  kinds = collections.defaultdict(collections.Counter)
  for name, entry in model.weights.entries.items():
    row = tensors.setdefault(entry.type, collections.Counter())
    row.update(
        count=1,
        weights=int(np.prod(entry.shape, dtype=np.int64)),
        bytes=entry.num_bytes,
    )
    if len(entry.shape) > 1:
      kinds[name.rpartition('/')[2]][entry.type] += 1
  weights = sum(row['weights'] for row in tensors.values())
  num_bytes = sum(row['bytes'] for row in tensors.values())
  tokenizer = model.tokenizer
  return {
      'source': model.source,
      'layout': model.layout,
      'variant': model.config.variant,
      'model': dict(model.config.__dict__),
      'tokenizer': tokenizer.vocab_size if tokenizer else None,
      'vision': dict(model.vision.config.__dict__) if model.vision else None,
      'weights': weights,
      'bytes': num_bytes,
      'bits_per_weight': 8 * num_bytes / weights,
      'tensors': {kind: dict(row) for kind, row in tensors.items()},
      'matrices': {kind: dict(types) for kind, types in kinds.items()},
      'metadata': {k: _short(v) for k, v in model.metadata.items()},
  }


def _short(value):
  text = value if isinstance(value, str) else repr(value)
  if len(text) <= _LONG:
    return value
  return f'{text[: _LONG]}... ({len(text):,} characters)'
