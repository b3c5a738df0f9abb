"""How is a small run started, disturbed at a chosen moment, and compared?"""

from collections.abc import Callable, Sequence
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from gemma_qat.commands import reproduce
from gemma_qat.training import metrics

STEPS = 40
# Checkpoints come often, so that kills meet them; codes start by the reference
# rule, so that a run is short.
CONFIG = (
    '--config=experiments/configs/base.py:tiny',
    '--config.quant.start=reference',
    "--config.quant.modes=((r'.', 'codes'),)",
    "--config.train.rules=((r'^embedding', None), (r'/scale$', 'scales'), "
    "(r'norm$', 'norms'))",
    '--config.train.length=32',
    f'--config.train.steps={STEPS}',
    '--config.train.checkpoint_every=4',
    '--config.train.evaluate_every=8',
    '--config.train.log_every=1',
    '--config.evaluation.chunks=2',
    '--config.evaluation.jax_chunks=1',
    '--config.evaluation.sample_tokens=0',
)
# Longer than any of these takes; what takes longer hangs.
PATIENCE = 600.0


def start(
    command: str,
    workdir: pathlib.Path,
    *more: str,
    devices: int = 1,
) -> subprocess.Popen:
  """Starts `gemma-qat COMMAND` on a workdir, its stderr to be read."""
  environment = dict(os.environ, JAX_PLATFORMS='cpu')
  environment['XLA_FLAGS'] = (
      f'--xla_force_host_platform_device_count={devices}'
  )
  return subprocess.Popen(
      [sys.executable, '-m', 'gemma_qat', command, *CONFIG, *more,
       f'--workdir={workdir}'],
      env=environment, text=True, stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
  )


def finish(process: subprocess.Popen) -> tuple[int, str]:
  """Waits for a process; (exit code, what it said)."""
  try:
    _, said = process.communicate(timeout=PATIENCE)
  except subprocess.TimeoutExpired:
    process.kill()
    process.communicate()
    return -1, f'hung for {PATIENCE:.0f} s'
  return process.returncode, said


def run(command: str, workdir: pathlib.Path, *more: str, devices: int = 1):
  """`start` and `finish`."""
  return finish(start(command, workdir, *more, devices=devices))


def disturb(
    process: subprocess.Popen,
    is_time: Callable[[], bool],
    number: signal.Signals,
    delay: float = 0.0,
) -> bool:
  """Sends a signal `delay` seconds after it is time; whether it still ran."""
  while process.poll() is None:
    if is_time():
      time.sleep(delay)
      if process.poll() is not None:
        return False
      process.send_signal(number)
      return True
    time.sleep(0.002)
  return False


def rows(workdir: pathlib.Path) -> int:
  """How many rows the metrics have by now."""
  path = workdir / metrics.FILE
  return path.read_bytes().count(b'\n') if path.exists() else 0


def is_saving(workdir: pathlib.Path) -> bool:
  """Whether a checkpoint is being written: Orbax renames it when it is whole.
  """
  folder = workdir / 'checkpoints'
  return folder.is_dir() and any(
      not p.name.isdecimal() for p in folder.iterdir()
  )


def is_exporting(workdir: pathlib.Path) -> bool:
  """Whether a file of the export, or of the report, is under way."""
  return any(workdir.glob('.*.gguf.*.partial'))


def differences(expected: pathlib.Path, workdir: pathlib.Path) -> list[str]:
  """What of a finished run is not what the undisturbed one left."""
  found = reproduce.compare(expected, workdir)
  said = [f'{n}: {v.said}' for n, v in found.items() if not v.is_same]
  steps = [r['step'] for r in metrics.read(workdir)]
  if steps != list(range(STEPS + 1)):
    said.append(f'rows of the steps {steps}')
  said += [f'left behind: {p.name}' for p in workdir.glob('.*.partial')]
  return said


def one_line(said: str) -> str:
  """The last line that a process said."""
  lines = [x for x in said.strip().splitlines() if x.strip()]
  return lines[-1] if lines else ''


def is_one_error(said: str, words: Sequence[str]) -> bool:
  """Whether it ended in one line of a user's error that has these words."""
  last = one_line(said)
  return 'Traceback' not in said and last.startswith('gemma-qat') and all(
      word in last for word in words
  )


def remove(folder: pathlib.Path) -> None:
  """Removes what the trials of a kind left."""
  shutil.rmtree(folder)
