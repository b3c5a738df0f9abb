"""The process that feeds damaged files to readers.

  python -m experiments.fuzz.child --reader=gguf,text --inputs=100 \
      --folder=FOLDER --scratch=FOLDER [--guided]

It is started by `python -m experiments.fuzz`, which outlives it. Guided
(atheris, one reader only), it keeps every input that reaches a new edge of our
code and changes those; otherwise it changes the valid files alone. A finding
is a file FOLDER/READER/findings/NAME, and NAME.txt, which says what it is:
`--again=FILE` reads it again. The exit code is 1 if there were any.
"""

import os
import pathlib
import random
import sys
import tempfile
import time
import traceback

from absl import app
from absl import flags
from absl import logging

_READER = flags.DEFINE_list('reader', [], 'Which readers.')
_INPUTS = flags.DEFINE_integer('inputs', 100_000, 'Inputs for each reader.')
_SECONDS = flags.DEFINE_integer('seconds', 0, 'At the most; 0 for no limit.')
_SEED = flags.DEFINE_integer('seed', 1, 'Of the changes.')
_FOLDER = flags.DEFINE_string('folder', '', 'Receives corpus and findings.')
_SCRATCH = flags.DEFINE_string('scratch', '', 'Empty, in memory if possible.')
_GUIDED = flags.DEFINE_bool('guided', False, 'By coverage, with atheris.')
_AGAIN = flags.DEFINE_string('again', '', 'One input, to be read again.')

LONGEST_SECONDS = 10
_INPUTS_A_LIMIT = 4096
_ROOT = pathlib.Path(__file__).parents[2]


def main(argv: list[str]) -> int:
  del argv
  os.environ['JAX_PLATFORMS'] = 'cpu'
  logging.set_verbosity(logging.ERROR)
  if _GUIDED.value:
    import atheris  # Optional, and it instruments only what comes after it.
    with atheris.instrument_imports(include=['gemma_qat']):
      from experiments.fuzz import targets  # pylint: disable=unused-import
  scratch = pathlib.Path(_SCRATCH.value).resolve()
  home = scratch / 'home'
  home.mkdir(exist_ok=True)
  # What a reader would write to a folder of its own choice is seen there.
  os.environ.update(HOME=str(home), TMPDIR=str(home), XDG_CACHE_HOME=str(home))
  tempfile.tempdir = None
  folder = pathlib.Path(_FOLDER.value).resolve()
  os.chdir(home)
  found = 0
  for name in _READER.value:
    fuzzing = Fuzzing(name, scratch, home, folder / name)
    fuzzing.forget_mended()
    if _AGAIN.value:
      print(fuzzing.read(pathlib.Path(_AGAIN.value).read_bytes()))
    elif _GUIDED.value:
      fuzzing.run_guided()
    else:
      fuzzing.run()
    found += count_findings(fuzzing.folder)
  return 1 if found else 0


class Fuzzing:
  """One reader, its valid files and its findings."""

  _guard = None

  def __init__(self, name, scratch, home, folder):
    # After the instrumentation.
    from experiments.fuzz import guard
    from experiments.fuzz import inputs
    from experiments.fuzz import state
    from experiments.fuzz import targets
    self._limit_memory = guard.limit_memory
    self._outcome = targets.outcome
    self._target = targets.TARGETS[name]
    sample = scratch / name / 'sample'
    sample.mkdir(parents=True)
    self._target.make(sample)
    self.files = inputs.Folder(
        sample, self._target.is_changed, self._target.is_replaced
    )
    self.folder = folder
    for kept in ('findings', 'corpus'):
      (folder / kept).mkdir(parents=True, exist_ok=True)
    self.state = state.State(scratch / f'{name}.state')
    # Whatever is loaded or compiled once is, before anything is watched.
    for data in self.files.seeds():
      with self.files.damaged(data) as path:
        said = self._outcome(self._target, path)
        assert said == 'read', f'{path} is not valid'
    if Fuzzing._guard is None:
      Fuzzing._guard = guard.Guard(
          [sys.prefix, sys.base_prefix, str(_ROOT / 'gemma_qat'), '<frozen',
           *(p for p in sys.path if p.endswith('site-packages'))],
          [home],
      )
    self._guard.watch([home, sample])
    self._done, self._findings = 0, count_findings(folder)

  def read(self, data: bytes) -> str:
    """Reads one input; returns 'read', 'refused' or 'finding'."""
    if self._done % _INPUTS_A_LIMIT == 0:
      self._limit_memory()
    self._done += 1
    data = data.ljust(2, b'\0')
    self.state.begin(data)
    problem = text = ''
    with self.files.damaged(data) as path:
      self._guard.begin(data, path)
      try:
        said = self._outcome(self._target, path)
        seen, taken = self._guard.end()
      except BaseException as error:  # pylint: disable=broad-exception-caught
        # Before the traceback is set, which opens files.
        seen, taken = self._guard.end()
        said, problem = 'finding', _place(error)
        text = traceback.format_exc(limit=-12)
    seconds = time.monotonic() - self.state.said.began
    if seconds > LONGEST_SECONDS:
      seen.append(f'slow: {seconds:.1f} seconds')
    if seen:
      said, problem = 'finding', problem or seen[0].split(':')[0]
    if problem:
      text = '\n'.join([path.name, *seen, text])
      keep_finding(self.folder, problem, data, text)
      self._findings = count_findings(self.folder)
    self.state.end(said, taken, self._findings)
    return said

  def forget_mended(self) -> None:
    """Reads the findings of earlier sessions; drops what is none any more."""
    for path in (self.folder / 'findings').glob('*Error-*'):
      if path.suffix != '.txt':
        data, said = path.read_bytes(), path.with_name(f'{path.name}.txt')
        path.unlink()
        said.unlink()
        # Is one again if it still is.
        self.read(data)
    self._findings = count_findings(self.folder)

  def run(self) -> None:
    """Reads changed valid files, each made from its number alone."""
    end = time.monotonic() + (_SECONDS.value or 1e9)
    seeds = self.files.seeds()
    for number in range(_INPUTS.value):
      rng = random.Random(f'{_SEED.value} {number}')
      self.read(self.files.mutate(rng.choice(seeds), rng))
      if time.monotonic() > end:
        break

  def run_guided(self) -> None:
    """Reads what reaches new edges, and changes of it. Does not return."""
    import atheris
    corpus = self.folder / 'corpus'
    for i, data in enumerate(self.files.seeds()):
      (corpus / f'seed-{i:03}').write_bytes(data)

    def mutate(data, max_size, seed):
      rng = random.Random(seed)
      return self.files.mutate(
          data, rng, lambda part: atheris.Mutate(part, max(len(part), 64))
      )[:max_size]

    from experiments.fuzz import inputs
    atheris.Setup(
        [sys.argv[0], str(corpus), f'-runs={_INPUTS.value}',
         f'-max_total_time={_SECONDS.value}', f'-seed={_SEED.value}',
         f'-max_len={inputs.LONGEST}', '-len_control=0', '-rss_limit_mb=0',
         # More at once, and nearly all is refused at the first look.
         '-mutate_depth=2',
         # The process above sees to time, of native code as well.
         '-timeout=3600', '-print_final_stats=1', '-reload=0'],
        self.read, custom_mutator=mutate,
    )
    atheris.Fuzz()


def keep_finding(
    folder: pathlib.Path, problem: str, data: bytes, text: str
) -> None:
  """Keeps the first input of a problem, and what there is to say of it."""
  path = folder / 'findings' / problem
  if not path.exists():
    path.write_bytes(data)
    path.with_name(path.name + '.txt').write_text(text, 'utf-8', 'replace')
    print(f'finding: {path}\n{text}', flush=True)


def count_findings(folder: pathlib.Path) -> int:
  """How many different problems were found."""
  return sum(1 for p in os.scandir(folder / 'findings')) // 2


def _place(error):
  """Names a problem: the kind of error, and where in our code it was."""
  frames = [
      f for f in traceback.extract_tb(error.__traceback__)
      if '/gemma_qat/' in f.filename
  ]
  where = 'nowhere'
  if frames:
    where = f'{pathlib.Path(frames[-1].filename).stem}-{frames[-1].lineno}'
  return f'{type(error).__name__}-{where}'


if __name__ == '__main__':
  app.run(main)
