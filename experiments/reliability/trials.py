"""Which disturbances are tried, and what has to come of each?

Each function yields trials one at a time: what was done, and what was lost of
the run ('' if nothing was). Nothing lost means: the same command goes on, and
ends with the checkpoint, metrics and files of a run that nobody disturbed, bit
for bit.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import time
from typing import NamedTuple

from experiments.reliability import commands
from gemma_qat.checkpoints import orbax_files
from gemma_qat.training import metrics

_LAST = commands.STEPS


class Trial(NamedTuple):
  """did: in words. lost: what, '' for nothing."""

  did: str
  lost: str


def kills(
    expected: pathlib.Path, scratch: pathlib.Path, draw: random.Random,
    usual: float, number: signal.Signals, moment: str, count: int,
) -> Iterator[Trial]:
  """Signals at random moments, several in the life of one run.

  Args:
    expected: workdir of the undisturbed run.
    scratch: an empty folder.
    draw: decides the moments.
    usual: seconds that a whole run takes.
    number: SIGKILL, SIGTERM or SIGINT.
    moment: 'any time' (of the process's life), 'a step', 'a checkpoint' (while
      it is written) or 'the export'.
    count: trials.
  """
  workdir = scratch / 'run'
  sent = []
  lasted = usual

  def settle(code=None, said=''):
    if code is None:
      code, said = commands.run('run', workdir)
    lost = commands.differences(expected, workdir) if not code else [
        f'exit code {code}: {commands.one_line(said)}'
    ]
    for did in sent:
      yield Trial(did, '; '.join(lost))
    sent.clear()
    shutil.rmtree(workdir)

  while count:
    before = commands.rows(workdir)
    process = commands.start('run', workdir)
    began = time.monotonic()
    delay = 0.0
    if moment == 'any time':
      delay = draw.uniform(0, lasted)
      is_time = lambda: True
    elif moment == 'a step':
      wanted = before + draw.randint(1, 8)
      is_time = lambda wanted=wanted: commands.rows(workdir) >= wanted
      delay = draw.uniform(0, 0.02)
    elif moment == 'a checkpoint':
      wanted = before + draw.randint(0, 8)
      is_time = lambda wanted=wanted: (
          commands.rows(workdir) >= wanted and commands.is_saving(workdir)
      )
      delay = draw.choice((0.0, draw.uniform(0, 0.05)))
    else:
      is_time = lambda: commands.is_exporting(workdir)
      delay = draw.uniform(0, 0.05)
    hit = commands.disturb(process, is_time, number, delay)
    code, said = commands.finish(process)
    if not hit or not code:
      # It was over before: no trial, but a run to compare.
      lasted = 0.8 * (time.monotonic() - began)
      yield from settle(code, said)
      continue
    count -= 1
    did = f'{number.name} after {commands.rows(workdir)} rows'
    # 75: saved, go on. A signal before there is anything to save ends at once.
    if number != signal.SIGKILL and code not in (75, 130, -number):
      yield Trial(did, f'exit code {code}: {commands.one_line(said)}')
      continue
    sent.append(did)
    if len(sent) == 5 or not count:
      yield from settle()


def damages(
    expected: pathlib.Path, scratch: pathlib.Path, draw: random.Random,
    kind: str, count: int,
) -> Iterator[Trial]:
  """Damages one file of the newest checkpoint, then lets the run go on.

  Args:
    expected, scratch, draw, count: as for `kills`.
    kind: 'a flipped bit', 'a lost end' or 'a lost file'.
  """
  for _ in range(count):
    workdir = scratch / 'run'
    shutil.copytree(expected, workdir)
    step = workdir / 'checkpoints' / str(_LAST)
    files = [p for p in sorted(step.rglob('*')) if p.is_file()]
    # Large ones hold more that can break.
    path = draw.choices(files, [p.stat().st_size + 64 for p in files])[0]
    contents = bytearray(path.read_bytes())
    if kind == 'a flipped bit' and contents:
      contents[draw.randrange(len(contents))] ^= 1 << draw.randrange(8)
    if kind == 'a lost end':
      contents = contents[:draw.randrange(max(1, len(contents)))]
    path.write_bytes(contents)
    if kind == 'a lost file':
      path.unlink()
    code, said = commands.run('run', workdir)
    lost = [f'exit code {code}: {commands.one_line(said)}'] if code else (
        commands.differences(expected, workdir)
    )
    is_noticed = (workdir / 'damaged' / str(_LAST)).is_dir()
    if is_noticed and 'It was moved to' not in said:
      lost.append('nothing was said')
    shutil.rmtree(workdir)
    yield Trial(
        f'{path.relative_to(workdir)}: '
        + ('noticed' if is_noticed else 'made no difference'),
        '; '.join(lost),
    )


def full_disks(
    expected: pathlib.Path, scratch: pathlib.Path, draw: random.Random,
    count: int,
) -> Iterator[Trial]:
  """Lets the disk run full at a random size; more room, and it goes on.

  A file system of its own, so that root alone can do it.
  """
  needed = sum(p.stat().st_size for p in expected.rglob('*') if p.is_file())
  for _ in range(count):
    kib = round(draw.uniform(0.02, 0.9) * needed / 1024)
    workdir = scratch / 'disk'
    workdir.mkdir()
    with _mounted(workdir, f'size={kib}k') as change:
      code, said = commands.run('run', workdir / 'run')
      lost = []
      if not commands.is_one_error(said, ()) or code != 2:
        lost.append(f'exit code {code}: {commands.one_line(said)}')
      change('size=1g')
      code, said = commands.run('run', workdir / 'run')
      lost += [f'exit code {code}: {commands.one_line(said)}'] if code else (
          commands.differences(expected, workdir / 'run')
      )
    yield Trial(f'{kib:,} KiB of {needed // 1024:,}', '; '.join(lost))


def refusals(
    expected: pathlib.Path, scratch: pathlib.Path, draw: random.Random,
) -> Iterator[Trial]:
  """What must not begin says why in one line, and changes nothing."""
  del draw
  workdir = scratch / 'disk'
  workdir.mkdir()
  with _mounted(workdir, 'size=1g') as change:
    shutil.copytree(expected, workdir / 'run')
    shutil.rmtree(workdir / 'run' / 'checkpoints' / str(_LAST))
    change('ro')
    code, said = commands.run('run', workdir / 'run')
    change('rw')
    yield _refused('a workdir that is read-only', code, said, 'workdir')
    # And nothing was lost by it.
    code, said = commands.run('run', workdir / 'run')
    yield Trial('the same, writable again', '; '.join(
        commands.differences(expected, workdir / 'run')
    ) if not code else commands.one_line(said))

  workdir = scratch / 'run'
  process = commands.start('run', workdir)
  while commands.rows(workdir) < 2 and process.poll() is None:
    time.sleep(0.01)
  code, said = commands.run('run', workdir)
  yield _refused(
      'a workdir in use', code, said, f'in use by process {process.pid}'
  )
  code, said = commands.finish(process)
  yield Trial('the run that used it', '; '.join(
      commands.differences(expected, workdir)
  ) if not code else commands.one_line(said))

  text = scratch / 'text'
  text.mkdir()
  words = random.Random(0)
  for i in range(40):
    (text / f'{i}.txt').write_text(' '.join(
        words.choice(('alpha', 'beta', 'gamma', 'delta')) + str(words.random())
        for _ in range(200)
    ))
  more = (
      f'--config.data.train=files:{text}/*.txt',
      f'--config.evaluation.text=files:{text}/*.txt',
      '--config.data.heldout_fraction=0.3',
  )
  workdir = scratch / 'vanished'
  process = commands.start('train', workdir, *more)
  commands.disturb(
      process, lambda: commands.rows(workdir) >= 6, signal.SIGTERM
  )
  commands.finish(process)
  text.rename(scratch / 'elsewhere')
  code, said = commands.run('train', workdir, *more)
  yield _refused('training text that vanished', code, said, 'files:')
  (scratch / 'elsewhere').rename(text)
  some = text / '7.txt'
  was = some.read_text()
  some.write_text(was + ' more')
  code, said = commands.run('train', workdir, *more)
  yield _refused(
      'training text that changed', code, said, 'training text is not what'
  )
  some.write_text(was)
  code, said = commands.run('train', workdir, *more)
  yield Trial('the text as it was, again', '' if not code else (
      commands.one_line(said)
  ))


def meshes(
    expected: pathlib.Path, scratch: pathlib.Path, draw: random.Random,
) -> Iterator[Trial]:
  """One run on 1, 2, 4, 8 and again 1 simulated devices, moved at random.

  Not bit for bit: sums over devices are rounded in another order.
  """
  del draw
  workdir = scratch / 'run'
  for stage, devices in enumerate((1, 2, 4, 8, 1), 1):
    process = commands.start('train', workdir, devices=devices)
    wanted = stage * _LAST // 5
    if stage < 5:
      commands.disturb(
          process, lambda wanted=wanted: commands.rows(workdir) > wanted,
          signal.SIGTERM,
      )
    code, said = commands.finish(process)
    lost = '' if code in (0, 75) else (
        f'exit code {code}: {commands.one_line(said)}'
    )
    rows = metrics.read(workdir)
    worst = _farthest(metrics.read(expected), rows)
    if worst > 2e-3:
      lost += f' a metric is {worst:.2%} off'
    step = orbax_files.find_step(workdir)
    said = orbax_files.load_manifest(step)
    if said['data']['next_index'] != int(step.name):
      lost += f' {said["data"]["next_index"]} batches at step {step.name}'
    yield Trial(
        f'{devices} devices to step {step.name}, metrics within {worst:.1e}',
        lost,
    )


def peers(
    expected: pathlib.Path, scratch: pathlib.Path, draw: random.Random,
    count: int,
) -> Iterator[Trial]:
  """Two processes, one of them killed; then both again."""
  for i in range(count):
    workdir = scratch / f'run{i}'
    victim = i % 2
    pair = _two(workdir)
    wanted = draw.randint(3, _LAST // 2)
    commands.disturb(
        pair[victim], lambda workdir=workdir, wanted=wanted:
        commands.rows(workdir) >= wanted, signal.SIGKILL,
    )
    began = time.monotonic()
    commands.finish(pair[victim])
    code, said = commands.finish(pair[1 - victim])
    took = time.monotonic() - began
    lost = ''
    is_said = commands.is_one_error(said, ('Another process', 'is gone')) or (
        'distributed service' in said
    )
    if not is_said or took > 130:
      lost = f'exit code {code} after {took:.0f} s: {commands.one_line(said)}'
    pair = _two(workdir)
    for process in pair:
      code, said = commands.finish(process)
      if code:
        lost += f' exit code {code}: {commands.one_line(said)}'
    worst = _farthest(metrics.read(expected), metrics.read(workdir))
    if worst > 2e-3:
      lost += f' a metric is {worst:.2%} off'
    yield Trial(
        f'process {victim} killed after {wanted} rows, the other ended '
        f'{took:.1f} s later', lost,
    )


def _two(workdir):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  return [
      commands.start(
          'train', workdir, f'--coordinator=127.0.0.1:{port}',
          '--num_processes=2', f'--process_id={i}',
      ) for i in (0, 1)
  ]


def _farthest(expected, rows):
  """The largest relative difference of a metric; rows must be the first ones.
  """
  if [r['step'] for r in rows] != list(range(len(rows))):
    return float('inf')
  return max(
      abs(row[name] - other[name]) / max(abs(other[name]), 1e-3)
      for row, other in zip(rows, expected)
      for name in row if name.endswith(('kl_nats', 'loss'))
  )


def _refused(did, code, said, words):
  is_refused = code == 2 and commands.is_one_error(said, (words,))
  return Trial(did, '' if is_refused else (
      f'exit code {code}: {commands.one_line(said)}'
  ))


@contextlib.contextmanager
def _mounted(folder, options):
  """A small file system in a folder; yields what mounts it anew otherwise."""
  mount = lambda o: subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', o, 'tmpfs', str(folder)], check=True
  )
  mount(options)
  try:
    yield lambda o: mount(f'remount,{o}')
  finally:
    subprocess.run(['umount', '-l', str(folder)], check=True)
    folder.rmdir()


def can_mount() -> bool:
  """Whether the trials with file systems of their own can be made."""
  return os.geteuid() == 0 and shutil.which('mount') is not None
