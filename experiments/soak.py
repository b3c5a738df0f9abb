"""Does anything grow in a long run: memory, files, the time of a step?

  python experiments/soak.py                # 2,400 steps of tiny, 6 minutes
  python experiments/soak.py --steps=10000

A child trains through `gemma-qat train`, evaluating and saving every 20 steps;
this process looks at it from outside, twice a second, in /proc (Linux). Writes
experiments/results/soak.{json,png}; the exit code is 1 where a limit of LIMITS
is broken.
"""

import argparse
from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from matplotlib import figure
import numpy as np

from gemma_qat.checkpoints import atomic
from gemma_qat.reporting import plots
from gemma_qat.training import metrics
from gemma_qat.training import saving
from gemma_qat.training import workdir as workdirs

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'experiments' / 'results' / 'soak'
# Of a run's steps; caches fill and the allocator finds its size in them.
WARM_UP = 0.25
# What is called flat. The first is 1 GB in 100,000 steps.
LIMITS = {
    'rss_mb_per_1000_steps': 10.0,
    'step_time_last_to_second_quarter': 1.1,
    'cpu_time_last_to_second_quarter': 1.1,
    'open_files_last_minus_warm': 8,
    'threads_last_minus_warm': 8,
    'metrics_kb_per_1000_steps': 100.0,
    'events_kb_per_1000_steps': 200.0,
    'checkpoints_kb_last_to_second_quarter': 1.1,
}


def main() -> int:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--config', default='experiments/configs/gemma3_270m_small.py:tiny')
  add('--steps', type=int, default=2_400)
  add('--every', type=int, default=20, help='steps to a checkpoint')
  add('--seconds', type=float, default=0.5, help='between two looks')
  add('--workdir', type=pathlib.Path, help='default: a temporary folder')
  add('--results', type=pathlib.Path, default=RESULTS,
      help='receives .json and .png')
  a, rest = parser.parse_known_args()
  with tempfile.TemporaryDirectory(prefix='gemma-qat-soak-') as temporary:
    workdir = a.workdir or pathlib.Path(temporary) / 'run'
    samples = watch(
        command(a.config, workdir, a.steps, a.every, rest), workdir, a.seconds
    )
    result = summarise(samples, metrics.read(workdir))
    revision = json.loads((workdir / workdirs.REVISION).read_text())
  result = {
      'config': a.config, 'evaluate_and_save_every': a.every,
      'other_flags': rest, 'revision': revision, **result, 'limits': LIMITS,
      'broken': broken(result),
  }
  with atomic.whole_file(a.results.with_suffix('.json')) as path:
    path.write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')
  with atomic.whole_file(a.results.with_suffix('.png')) as path:
    plot(result, path)
  for name in LIMITS:
    print(f'{name}: {result[name]:.4g} (at most {LIMITS[name]})')
  print(f'The numbers and the plot: {a.results}.json, .png')
  return 1 if result['broken'] else 0


def command(
    config: str, workdir: pathlib.Path, steps: int, every: int,
    more: Sequence[str] = (),
) -> list[str]:
  """The command line of the child."""
  return [
      sys.executable, '-m', 'gemma_qat', 'train', f'--config={config}',
      f'--workdir={workdir}', f'--config.train.steps={steps}',
      f'--config.train.evaluate_every={every}',
      f'--config.train.checkpoint_every={every}',
      f'--config.train.log_every={max(1, every // 2)}', *more,
  ]


def watch(
    argv: Sequence[str], workdir: pathlib.Path, seconds: float
) -> list[dict[str, float]]:
  """Runs a training command and looks at its process until it ends.

  Returns:
    For every look: seconds since the start, last logged step, rss_mb,
    anonymous_mb, open_files, threads, cpu_seconds, and the size of what is
    written.

  Raises:
    SystemExit: the command failed.
  """
  start = time.monotonic()
  samples = []
  with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL) as child:
    while child.poll() is None:
      sample = _look(child.pid, workdir)
      if sample is not None:
        samples.append({'seconds': time.monotonic() - start, **sample})
      time.sleep(seconds)
  if child.returncode:
    raise SystemExit(f'Training ended with exit code {child.returncode}.')
  return samples


def summarise(
    samples: Sequence[Mapping[str, float]], rows: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
  """Fits the slopes of what was seen from outside, and of the metrics.

  Args:
    samples: from `watch`.
    rows: of `metrics.jsonl`.
  """
  of = lambda name, some: np.array([s[name] for s in some], np.float64)
  steps = int(rows[-1]['step'])
  warm = [s for s in samples if s['step'] >= WARM_UP * steps]
  slope = lambda name: 1e3 * _slope(of('step', warm), of(name, warm))
  within = lambda some, low, high: [
      s for s in some if low * steps < s['step'] <= high * steps
  ]
  middle = lambda name, *quarter: np.median(of(name, within(warm, *quarter)))
  second, last = (0.25, 0.5), (0.75, 1.0)
  speeds = step_times(rows)
  # The fastest tenth: other work on the machine only makes rows slower.
  ms = lambda quarter: np.percentile(of('ms', within(speeds, *quarter)), 10)
  cpu = lambda quarter: np.polyfit(
      of('step', within(warm, *quarter)), of('cpu_seconds', within(
          warm, *quarter
      )), 1
  )[0]
  final = samples[-1]
  result = {
      'steps': steps,
      'minutes': final['seconds'] / 60,
      'rss_mb_second_quarter': middle('rss_mb', *second),
      'rss_mb_last_quarter': middle('rss_mb', *last),
      'rss_mb_most': max(of('rss_mb', samples)),
      'rss_mb_per_1000_steps': slope('rss_mb'),
      'anonymous_mb_per_1000_steps': slope('anonymous_mb'),
      'step_ms_second_quarter': ms(second),
      'step_ms_last_quarter': ms(last),
      'step_time_last_to_second_quarter': ms(last) / ms(second),
      'cpu_time_last_to_second_quarter': cpu(last) / cpu(second),
      'metrics_kb_per_1000_steps': slope('metrics_kb'),
      'events_kb_per_1000_steps': slope('events_kb'),
      'checkpoints_kb_last_to_second_quarter': (
          middle('checkpoints_kb', *last) / middle('checkpoints_kb', *second)
      ),
      **{
          f'{name}_last_minus_warm': middle(name, *last)
          - middle(name, *second) for name in ('open_files', 'threads')
      },
      'workdir_mb_at_the_end': final['workdir_mb'],
  }
  result = {k: round(float(v), 4) for k, v in result.items()}
  return result | {'step_times': speeds, 'samples': _thin(samples)}


def step_times(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
  """[{step, ms}] of the rows that know their speed, the first left out."""
  timed = [r for r in rows if 'tokens_per_second' in r][1:]
  return [
      {'step': r['step'], 'ms': round(
          1e3 * r['tokens'] / r['step'] / r['tokens_per_second'], 3
      )} for r in timed
  ]


def broken(result: Mapping[str, float]) -> list[str]:
  """The limits that a result does not keep."""
  return [name for name, most in LIMITS.items() if result[name] > most]


def plot(result: Mapping[str, Any], path: str | os.PathLike) -> None:
  """Draws memory, step time, disk and handles over the steps."""
  drawing = figure.Figure(
      figsize=(plots.WIDTH, 9.6), dpi=plots.DPI, layout='constrained'
  )
  memory, speed, disk, handles = drawing.subplots(4, 1, sharex=True)
  samples = [s for s in result['samples'] if s['step']]
  line = lambda axes, name, label: axes.plot(
      [s['step'] for s in samples], [s[name] for s in samples],
      label=label, linewidth=1.2,
  )
  line(memory, 'rss_mb', 'resident (RSS)')
  line(memory, 'anonymous_mb', 'of it anonymous')
  memory.set_ylabel('memory (MB)')
  memory.set_title(
      f'Memory after warm-up: {result["rss_mb_per_1000_steps"]:+.2f} MB per '
      '1,000 steps', loc='left', fontsize=11,
  )
  steps, ms = zip(*[(t['step'], t['ms']) for t in result['step_times']])
  speed.plot(steps, ms, '.', markersize=3)
  # Other work on the machine makes single rows slow; they shall not set the
  # scale.
  speed.set_ylim(0, 2 * float(np.median(ms)))
  speed.set_ylabel('time of a step (ms)')
  high = sum(m > 2 * np.median(ms) for m in ms)
  speed.set_title(
      'Step time, last quarter over second: '
      f'{result["step_time_last_to_second_quarter"]:.3f} (fastest tenth), CPU '
      f'{result["cpu_time_last_to_second_quarter"]:.3f}\neach dot the mean of '
      f'{steps[1] - steps[0]:.0f} steps; {high} of {len(ms)} lie above the '
      'frame', loc='left', fontsize=11,
  )
  line(disk, 'checkpoints_kb', 'checkpoints')
  line(disk, 'metrics_kb', 'metrics.jsonl')
  line(disk, 'events_kb', 'events')
  disk.set_yscale('log')
  disk.set_ylabel('size on disk (kB)')
  disk.set_title(
      f'Files: metrics.jsonl {result["metrics_kb_per_1000_steps"]:+.1f} kB, '
      f'events {result["events_kb_per_1000_steps"]:+.1f} kB per 1,000 steps; '
      f'workdir {result["workdir_mb_at_the_end"]:.0f} MB',
      loc='left', fontsize=11,
  )
  line(handles, 'open_files', 'open files')
  line(handles, 'threads', 'threads')
  handles.set_ylabel('count')
  handles.set_xlabel('training step')
  for axes in (memory, disk, handles):
    axes.legend(frameon=False, ncols=3, loc=(
        'upper right' if axes is handles else 'lower right'
    ))
  for axes in (memory, handles):
    axes.set_ylim(bottom=0)
  for axes in (memory, speed, disk, handles):
    plots.tidy(axes)
    axes.grid(True, color='#e5e5e5', linewidth=0.8)
    axes.axvspan(0, WARM_UP * result['steps'], color='#f4f4f4', zorder=0)
  drawing.savefig(path, format='png')


def _look(pid, workdir):
  """One sample; None where the process has just ended."""
  proc = pathlib.Path('/proc') / str(pid)
  try:
    status = dict(
        line.split(':', 1) for line in (proc / 'status').read_text().split('\n')
        if ':' in line
    )
    mb = lambda name: int(status[name].split()[0]) / 1024
    seen = {
        'rss_mb': mb('VmRSS'),
        'anonymous_mb': mb('RssAnon'),
        'open_files': len(os.listdir(proc / 'fd')),
        'threads': int(status['Threads']),
        # User and system time; behind the name, which may hold spaces.
        'cpu_seconds': sum(map(int, (proc / 'stat').read_text().rpartition(
            ') '
        )[2].split()[11:13])) / os.sysconf('SC_CLK_TCK'),
    }
  except (OSError, KeyError):
    return None
  rows = metrics.read(workdir)
  return {
      'step': rows[-1]['step'] if rows else 0,
      **seen,
      'metrics_kb': _size(workdir / metrics.FILE) / 1e3,
      'events_kb': _size(workdir / metrics.EVENTS) / 1e3,
      'checkpoints_kb': _size(workdir / saving.FOLDER) / 1e3,
      'workdir_mb': _size(workdir) / 1e6,
  }


def _size(path):
  """Bytes of a file or of all in a folder; it may vanish meanwhile."""
  if path.is_file():
    return path.stat().st_size
  total = 0
  for folder, _, files in os.walk(path):
    for name in files:
      try:
        total += os.lstat(os.path.join(folder, name)).st_size
      except FileNotFoundError:
        pass  # Orbax has removed an old step.
  return total


def _slope(x, y, drop=100.0):
  """The common slope of the pieces between falls by more than `drop`.

  Once in a run, when Python's oldest garbage goes, the allocator gives 400 MB
  of the start back; across that fall all else would look like shrinking.
  """
  pieces = np.split(np.arange(len(x)), np.flatnonzero(np.diff(y) < -drop) + 1)
  centred = lambda v: np.concatenate([v[p] - v[p].mean() for p in pieces])
  return centred(x) @ centred(y) / (centred(x) @ centred(x))


def _thin(samples, most=300):
  """At most so many of them, evenly, with few digits: the file is kept."""
  chosen = samples[:: max(1, -(-len(samples) // most))]
  return [{k: round(v, 2) for k, v in s.items()} for s in chosen]


if __name__ == '__main__':
  sys.exit(main())
