"""Does any damaged file get more than a clear refusal out of a reader?

  python -m experiments.fuzz [--reader=gguf,text] [--inputs=100000] \
      [--seconds=N] [--folder=runs/fuzz] [--store]

Every input is a small valid model, run or text with one file of it damaged.
A reader may read it or raise a UserError of one line. A finding is anything
else: another exception, a process that dies, more than 10 seconds, more than
1 GiB of memory, a file written, a process started, code run (see guard.py).

With atheris (pip install -e '.[fuzz]') the inputs are guided by the edges of
our code that they reach, and a corpus grows in FOLDER/READER/corpus; without,
they are changes of the valid files alone. One process at a time. Stopped at
any time, the same command goes on until each reader has had so many inputs.
Findings lie in FOLDER/READER/findings; those that were mended since are dropped
when the reader is fuzzed again. --store writes what was counted to
experiments/results/fuzz.jsonl and fuzz.md. The exit code is 1 if anything was
found.
"""

import dataclasses
import importlib.util
import json
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags

from experiments.fuzz import child
from experiments.fuzz import state as states
from gemma_qat.training import workdir

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / 'experiments' / 'results'
READERS = (
    'configs', 'text', 'tokenizer_model', 'stored_tokenizer', 'tokenizer_json',
    'gguf', 'huggingface', 'sbs', 'orbax', 'orbax_resumed',
    'google',
)
_STORE = flags.DEFINE_bool('store', False, 'Write the table of results.')

# What is started, with the flags of child.py.
CHILD = ['-m', 'experiments.fuzz.child']
# Starting takes seconds, and no input has begun.
_LONGEST_START = 300
_SAID_EVERY = 30


@dataclasses.dataclass
class Total:
  """What one reader has had, over all processes and sessions."""

  reader: str
  inputs: int = 0
  read: int = 0
  refused: int = 0
  findings: int = 0
  seconds: float = 0.0
  edges: int | None = None
  slowest_seconds: float = 0.0
  most_bytes: int = 0
  peak_rss_bytes: int = 0
  device: str = ''


def main(argv: list[str]) -> int:
  del argv
  # Also where a shell in the background has interrupts ignored.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.default_int_handler)
  F = flags.FLAGS
  folder = pathlib.Path(F.folder or ROOT / 'runs' / 'fuzz')
  is_guided = importlib.util.find_spec('atheris') is not None
  totals = []
  for name in F.reader or READERS:
    totals.append(
        fuzz(name, folder / name, F.inputs, F.seconds, is_guided)
    )
    print(json.dumps(dataclasses.asdict(totals[-1])), flush=True)
  if _STORE.value:
    store(folder)
  return 1 if any(t.findings for t in totals) else 0


def fuzz(
    name: str, folder: pathlib.Path, inputs: int, seconds: int,
    is_guided: bool,
) -> Total:
  """Gives a reader its inputs, whatever becomes of the process.

  Args:
    name: of the reader.
    folder: its own.
    inputs: in all, with those of earlier sessions.
    seconds: of this session at the most; 0 for no limit.
    is_guided: by coverage, with atheris.
  """
  folder.mkdir(parents=True, exist_ok=True)
  total = _load(folder, name)
  end = time.monotonic() + (seconds or 1e9)
  while total.inputs < inputs and (rest := end - time.monotonic()) > 1:
    before = dataclasses.replace(total)
    try:
      _run_child(total, folder, inputs - total.inputs,
                 int(rest) if seconds else 0, is_guided)
    finally:
      _save(folder, total)
    if total.inputs == before.inputs:
      raise SystemExit(f'{name} does not start: see {folder / "log.txt"}.')
  return total


def _run_child(total, folder, inputs, seconds, is_guided):
  """Runs one process to its end, or to that of an input it dies of."""
  # Kept inputs are run again when a process starts: those do not count.
  again = len(list((folder / 'corpus').glob('*'))) if is_guided else 0
  memory = pathlib.Path('/dev/shm')
  with tempfile.TemporaryDirectory(
      dir=memory if memory.is_dir() else None
  ) as scratch, open(folder / 'log.txt', 'w+', errors='replace') as log:
    state = states.State(pathlib.Path(scratch) / f'{total.reader}.state')
    begin, before = time.monotonic(), dataclasses.replace(total)
    process = subprocess.Popen(
        [sys.executable, *CHILD,
         f'--reader={total.reader}', f'--inputs={inputs + again}',
         f'--seconds={seconds}', f'--seed={total.inputs + 1}',
         f'--folder={folder.parent}', f'--scratch={scratch}',
         *(['--guided'] if is_guided else [])],
        stdout=log, stderr=log, cwd=ROOT,
    )
    try:
      _watch(process, state, total, before, again, begin)
    finally:
      process.kill()
      process.wait()
      said = state.look()
      _count(total, before, said, again, begin)
    if said.began:
      # It died, or had to, in the middle of an input.
      log.seek(0)
      is_hang = time.monotonic() - said.began > child.LONGEST_SECONDS
      child.keep_finding(
          folder, 'hang' if is_hang else f'died-{-process.returncode}',
          state.last(), log.read()[-3000:],
      )
    total.findings = child.count_findings(folder)
    log.seek(0)
    edges = [int(n) for n in re.findall(r'cov: (\d+)', log.read())]
    total.edges = max([total.edges or 0, *edges]) or None


def _watch(process, state, total, before, again, begin):
  """Waits for a process; leaves one that hangs."""
  spoke = begin
  while process.poll() is None:
    time.sleep(0.2)
    now, said = time.monotonic(), state.look()
    if said.began and now - said.began > child.LONGEST_SECONDS + 1:
      return
    if not said.inputs and now - begin > _LONGEST_START:
      return
    if now - spoke > _SAID_EVERY:
      spoke = now
      _count(total, before, said, again, begin)
      print(f'{total.reader}: {total.inputs:,} inputs, {total.refused:,} '
            f'refused, {total.findings} findings, {total.seconds:.0f} s',
            flush=True)


def _count(total, before, said, again, begin):
  fresh = max(0, said.inputs - again)
  total.inputs = before.inputs + fresh
  # Of what ran again, too, most is refused: the shares are what counts.
  share = fresh / max(1, said.inputs)
  total.read = before.read + round(said.read * share)
  total.refused = before.refused + round(said.refused * share)
  total.findings = said.findings
  total.seconds = round(before.seconds + time.monotonic() - begin, 1)
  total.slowest_seconds = round(max(before.slowest_seconds, said.slowest), 3)
  total.most_bytes = max(before.most_bytes, int(said.taken))
  total.peak_rss_bytes = max(before.peak_rss_bytes, int(said.peak))
  total.device = workdir.device_name()


def store(folder: pathlib.Path) -> None:
  """Writes the results: a line of JSON a reader, and the table of them.

  Of readers that the folder knows nothing of, what was stored before stays.
  """
  known = {t.reader: t for t in stored()} | {
      name: _load(folder / name, name) for name in READERS
      if (folder / name / 'total.json').exists()
  }
  totals = [known[name] for name in READERS if name in known]
  (RESULTS / 'fuzz.jsonl').write_text(''.join(
      f'{json.dumps(dataclasses.asdict(t))}\n' for t in totals
  ))
  (RESULTS / 'fuzz.md').write_text(render(totals))


def stored() -> list[Total]:
  """Reads the results that were stored, if there are any."""
  path = RESULTS / 'fuzz.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  return [Total(**json.loads(line)) for line in lines]


def render(totals: list[Total]) -> str:
  """Sets the results as Markdown."""
  lines = [
      '| reader | inputs | read | refused | findings | edges | s '
      '| slowest input, s | most memory of an input, MB | peak RSS, MB |',
      '|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|',
  ]
  lines += [
      f'| {t.reader} | {t.inputs:,} | {t.read:,} | {t.refused:,} '
      f'| {t.findings} | {t.edges or "-"} | {t.seconds:,.0f} '
      f'| {t.slowest_seconds:.2f} | {t.most_bytes / 1e6:.0f} '
      f'| {t.peak_rss_bytes / 1e6:.0f} |' for t in totals
  ]
  devices = ', '.join(dict.fromkeys(t.device for t in totals))
  return (
      f'Damaged files, by `python -m experiments.fuzz --store` on a {devices}, '
      'one process at a time, guided by edges (of our own Python code that '
      'were reached). An input is a small valid model, run or text with one '
      'file damaged; it is read or refused in one line. A finding is anything '
      'else: another error, a crash, more than 10 s, more than 1 GiB, a file '
      'written, a process started, code run. Those that earlier inputs found '
      'were mended, each with a test: counted is what is left.\n\n'
      + '\n'.join(lines) + '\n'
  )


def _load(folder, name):
  path = folder / 'total.json'
  if not path.exists():
    return Total(name)
  return Total(**json.loads(path.read_text()))


def _save(folder, total):
  (folder / 'total.json').write_text(
      json.dumps(dataclasses.asdict(total), indent=2) + '\n'
  )


if __name__ == '__main__':
  app.run(main)
