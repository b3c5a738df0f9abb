"""Which text does a run train on, in which order, and which never?"""

import pathlib
from typing import Any, Callable, NamedTuple

import ml_collections
import numpy as np

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.data import pipeline
from gemma_qat.data import sources

Batch = dict[str, np.ndarray]


class Text(NamedTuple):
  """The text of a run as batches; `digest` names it, see `pipeline.digest`."""

  batches: Any
  heldout: list[Batch]
  calibrating: Callable[[], list[Batch]]
  digest: str

  def state(self) -> dict[str, Any]:
    """What a manifest says of it."""
    return {'data': self.batches.get_state(), 'text': self.digest}

  def go_on(self, manifest, workdir):
    """Continues behind the last batch that a manifest counted."""
    if manifest['text'] != self.digest:
      raise errors.UserError(
          f'The training text is not what --workdir={workdir} was trained on '
          'so far: bring it back, or choose a new workdir.'
      )
    self.batches.set_state(manifest['data'])


def read(
    config: ml_collections.ConfigDict,
    base: checkpoints.Checkpoint,
    workdir: pathlib.Path,
    share: tuple[int, int] = (0, 1),
) -> Text:
  """Reads and tokenizes the text of a run; tokens are kept in the workdir.

  Args:
    config: of the run.
    base: whose tokenizer reads.
    workdir: of the run.
    share: (index, count) of the rows of each batch that this process reads,
      see `sharding.share`. Batches for calibration are whole everywhere.

  Raises:
    UserError: no tokenizer, or too little text.
  """
  tokenizer = checkpoints.tokenizer(base)
  training, heldout = documents(config)
  size, length = config.train.batch_size, config.train.length
  weights = sources.weights(config.data.train)
  make = lambda some, seed, share=share: pipeline.make_dataset(
      some, tokenizer, size, length, seed, weights=weights,
      shard_index=share[0], shard_count=share[1],
      cache_dir=workdir / 'tokens',
  )
  count = -(-config.quant.calibration_tokens // (size * length))
  take = lambda batches, n: [next(batches) for _ in range(n)]
  return Text(
      batches=make(training, config.seed),
      heldout=take(make(heldout, config.seed), config.train.heldout_batches),
      # Another order than training's, so that the first batches differ.
      calibrating=lambda: take(
          make(training, config.seed + 1, share=(0, 1)), count
      ),
      digest=pipeline.digest(training, tokenizer),
  )


def evaluation(config: ml_collections.ConfigDict) -> list[sources.Document]:
  """Reads the documents that a run is evaluated on, none of them trained on."""
  source = config.evaluation.text
  if source == config.data.train:
    return sources.load_pair(source, source)[1]
  return sources.load(source)


def documents(config: ml_collections.ConfigDict):
  """Reads (training, held-out) documents; neither shares text with evaluation.
  """
  training, _ = sources.load_pair(config.data.train, config.evaluation.text)
  return sources.split(training, config.data.heldout_fraction, config.seed)
