"""What a run is evaluated on is never what it is trained on."""

from experiments.configs import base
from gemma_qat.data import overlap
from gemma_qat.training import text as text_lib


def _config(train, evaluation):
  config = base.get_config('tiny').unlock()
  config.data.train, config.evaluation.text = train, evaluation
  config.data.heldout_fraction = 0.3
  return config.lock()


def test_one_source_for_both_is_split(text):
  config = _config(f'files:{text}/*.txt', f'files:{text}/*.txt')
  evaluation = text_lib.evaluation(config)
  assert 0 < len(evaluation) < 50
  training, heldout = text_lib.documents(config)
  names = [d.name for d in (*training, *heldout, *evaluation)]
  assert len(set(names)) == len(names)
  spans = overlap.HeldOut([d.text for d in evaluation])
  assert not any(spans.find(d.text) for d in (*training, *heldout))


def test_two_sources_are_read_whole(text):
  config = _config(f'files:{text}/train*.txt', f'files:{text}/held*.txt')
  assert len(text_lib.evaluation(config)) == 10
  training, heldout = text_lib.documents(config)
  assert len(training) + len(heldout) == 40
