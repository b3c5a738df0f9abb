"""Plan a run on TPUs or GPUs that are not at hand: memory, traffic, time.

The training step of a config is compiled ahead of time, on this machine's CPU,
for the devices that are named; nothing is downloaded or allocated.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import threading
import time

from gemma_qat import errors
from gemma_qat.checkpoints import atomic
from gemma_qat.checkpoints import detect
from gemma_qat.commands import config_flags
from gemma_qat.commands import plan_sheets
from gemma_qat.model import config as model_config
from gemma_qat.reporting import sheets
from gemma_qat.training import forecast
from gemma_qat.training import topologies

# Seconds between signs of life.
_EVERY = 30


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
      'gemma-qat plan', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('--topology', required=True,
      help='v5p:2x2x4, v5e:4x4, v6e:8x8 (compiled by libtpu, which '
      "pip install -e '.[tpu]' brings) or gpu:8xH100 (simulated)")
  add('--size', help=f'{", ".join(model_config.VARIANTS)} (default: that of '
      'config.model.checkpoint)')
  add('--json', type=pathlib.Path, metavar='FILE.json',
      help='write the figures there as well')
  a, config = config_flags.parse(parser, argv)
  topology = topologies.parse(a.topology)
  model = model_config.variant(a.size) if a.size else _model(config)
  with _clock(f'compiling a step of {model.variant} for {topology.count} x '
              f'{topology.device.name}'):
    found = forecast.make(config, model, topology)
  print(sheets.set_plain(plan_sheets.detail(found)))
  if a.json:
    text = json.dumps(plan_sheets.figures(found), indent=2) + '\n'
    with atomic.whole_file(a.json) as path:
      path.write_text(text, encoding='utf-8')
  return 0


def _model(config) -> model_config.ModelConfig:
  """The sizes of the config's checkpoint, of which no weight is read."""
  name = config.model.checkpoint
  if name == detect.PACKAGED:
    return model_config.variant('270m')
  try:
    return detect.load(name).config
  except errors.UserError as error:
    raise errors.UserError(
        f'{error} A plan needs no checkpoint: give --size=4b or '
        '--config.model.checkpoint=random:4b.'
    ) from error


@contextlib.contextmanager
def _clock(what):
  """Says on stderr what takes so long, and how long it has taken."""
  start, done = time.monotonic(), threading.Event()
  say = lambda text: print(text, file=sys.stderr, flush=True)

  def tick():
    while not done.wait(_EVERY):
      say(f'{what}: {time.monotonic() - start:.0f} s')

  say(f'{what}: minutes, as on the machines themselves ...')
  thread = threading.Thread(target=tick, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
  say(f'{what}: {time.monotonic() - start:.0f} s, done')
