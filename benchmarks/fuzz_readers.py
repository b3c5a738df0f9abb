"""Which malformed inputs get anything but a clear error from a reader?

  python -m benchmarks.fuzz_readers --inputs=100000 [--readers=gguf,sbs]

Every input is a small valid checkpoint with something wrong in it, made from
its number alone. A reader may read it or raise a UserError of one line.
Whatever else happens (another exception, a crash of the process, more than 10
seconds, more than 1 GiB) is a finding: it is printed, and the exit code is 1.
Each reader runs in a process of its own, which is started again behind an
input that killed it.
"""

import collections
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

from absl import app
from absl import flags
import tqdm

from tests.checkpoints import malformed_samples

_INPUTS = flags.DEFINE_integer('inputs', 1000, 'Inputs for each reader.')
_FIRST = flags.DEFINE_integer('first', 0, 'Number of the first input.')
_READERS = flags.DEFINE_list(
    'readers', list(malformed_samples.SAMPLES), 'Which readers.'
)
_SECONDS = flags.DEFINE_float(
    'seconds', 0, 'Stop each reader after this long; 0 for never.'
)
_CHILD = flags.DEFINE_bool('child', False, 'Used by the script itself.')

_LONGEST = 10
# Also of the first input, before which the sample is made and code compiled.
_SILENCE = 60


def main(argv):
  del argv
  if _CHILD.value:
    return _run(_READERS.value[0])
  rows, is_clean = [], True
  for name in _READERS.value:
    counted, findings, seconds = _supervise(name)
    rows.append((name, counted, findings, seconds))
    is_clean = is_clean and not findings
  print(f'{"reader":16}{"inputs":>9}{"read":>9}{"refused":>9}'
        f'{"findings":>9}{"ms each":>9}')
  for name, counted, findings, seconds in rows:
    total = counted.total() + findings
    print(f'{name:16}{total:9,}{counted["read"]:9,}{counted["refused"]:9,}'
          f'{findings:9,}{1000 * seconds / max(1, total):9.1f}')
  return 0 if is_clean else 1


def _supervise(name):
  """Runs all inputs of one reader, whatever becomes of its process."""
  counted, findings = collections.Counter(), 0
  begin, first = time.monotonic(), _FIRST.value
  last = first + _INPUTS.value
  with tqdm.tqdm(total=_INPUTS.value, desc=name, disable=None) as progress:
    while first < last and not _is_late(begin):
      command = [
          sys.executable, '-m', 'benchmarks.fuzz_readers', '--child',
          f'--readers={name}', f'--first={first}', f'--inputs={last - first}',
      ]
      # The noise of a process goes to a file: a pipe would fill up.
      with tempfile.TemporaryFile('w+') as noise, subprocess.Popen(
          command, stdout=subprocess.PIPE, stderr=noise, text=True
      ) as child:
        watch = _Watch(child)
        for line in child.stdout:
          watch.feed()
          number, said = json.loads(line)
          if said.startswith('begin'):
            first = number
            continue
          first = number + 1
          progress.update()
          if said in ('read', 'refused'):
            counted[said] += 1
          else:
            findings += 1
            print(f'{name} {number}: {said}', flush=True)
          if _is_late(begin):
            child.kill()
            return counted, findings, time.monotonic() - begin
        child.wait()
        watch.stop()
        if child.returncode:
          findings += 1
          noise.seek(0)
          print(f'{name} {first}: the process ended with {child.returncode}: '
                f'{noise.read()[-2000:]}', flush=True)
          first += 1
  return counted, findings, time.monotonic() - begin


class _Watch:
  """Kills a process that has been silent for long: native code may hang."""

  def __init__(self, child):
    self._child, self._timer = child, None
    self.feed()

  def feed(self):
    self.stop()
    self._timer = threading.Timer(_SILENCE, self._child.kill)
    self._timer.daemon = True
    self._timer.start()

  def stop(self):
    if self._timer is not None:
      self._timer.cancel()


def _is_late(begin):
  return _SECONDS.value and time.monotonic() - begin > _SECONDS.value


def _run(name):
  """Reads inputs and prints [number, outcome] of each, in lines of JSON."""
  sample = malformed_samples.SAMPLES[name]
  signal.signal(signal.SIGALRM, _alarmed)
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary).resolve() / 'sample'
    folder.mkdir()
    sample.make(folder)
    # Also compiles what is compiled once.
    malformed_samples.outcome(sample, folder)
    malformed_samples.limit_memory()
    for number in range(_FIRST.value, _FIRST.value + _INPUTS.value):
      _say(number, 'begin')
      signal.alarm(_LONGEST)
      try:
        said = malformed_samples.changed_outcome(
            sample, folder, random.Random(f'{name} {number}')
        )
      except BaseException:  # pylint: disable=broad-exception-caught
        said = traceback.format_exc(limit=-4)
      finally:
        signal.alarm(0)
      _say(number, said)


def _say(number, what):
  print(json.dumps([number, what]), flush=True)


def _alarmed(number, frame):
  del number, frame
  raise TimeoutError(f'more than {_LONGEST} seconds')


if __name__ == '__main__':
  app.run(main)
