"""Do the main job at every point of a config's sweep; go on where it stands.

A config may define sweep(add) beside get_config: each add(name, changes) is a
point, a run of its own in WORKDIR/NAME. Finished points are skipped, stopped
ones go on, one that fails does not end the others.
"""

import argparse
import pathlib
import sys
import time

from gemma_qat import errors
from gemma_qat.checkpoints import atomic
from gemma_qat.commands import config_flags
from gemma_qat.commands import job_flags
from gemma_qat.commands import run
from gemma_qat.commands import run_folders
from gemma_qat.commands import sweep_cluster
from gemma_qat.commands import sweep_jobs
from gemma_qat.commands import sweep_points
from gemma_qat.commands import sweep_sheets
from gemma_qat.training import metrics

_SUBMITTED = '.submitted'
# Seconds between two looks at how far the points are.
_EVERY = 5.0


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
      'gemma-qat sweep', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('--workdir', required=True, type=pathlib.Path,
      help='receives a folder for every point')
  add('--only', metavar='NAME,...', help='these points alone')
  add('--list', action='store_true',
      help='say which points there are and how they stand; run nothing')
  add('--parallel', type=int, metavar='N',
      help='points at a time (default: 1; on Slurm all); each gets its share '
      'of the CPUs and, where there are GPUs, of those')
  add('--point', metavar='INDEX|NAME',
      help='do this one point here, for example in a job array: '
      '--point=$SLURM_ARRAY_TASK_ID')
  add('--executor', choices=sweep_cluster.EXECUTORS,
      help='run the points by submitit (pip install .[cluster])')
  add('--cluster_options', default='', metavar='NAME=VALUE,...',
      help="submitit's parameters: timeout_min=60,slurm_partition=gpu")
  job_flags.add(parser)
  a, overrides = config_flags.split(parser, argv)
  _check(a)
  points = sweep_points.read(a.config, overrides)
  if a.point is not None:
    _do(a, sweep_points.find(points, a.point))
    return 0
  chosen = sweep_points.choose(points, a.only)
  if a.list:
    states = {p.name: _state(a, p) for p in chosen}
    print(sweep_sheets.listing(points, states))
    return 0
  return _sweep(a, chosen, overrides)


def _check(a):
  if a.parallel is not None and a.parallel < 1:
    raise errors.UserError(f'--parallel={a.parallel} is below 1.')
  several = a.distributed or a.coordinator
  if several and a.point is None:
    raise errors.UserError(
        '--distributed and --coordinator are of one point, in all of its '
        'processes: give --point=INDEX too.'
    )
  if a.cluster_options and not a.executor:
    raise errors.UserError(
        '--cluster_options goes with --executor=slurm (or local).'
    )
  sweep_cluster.options(a.cluster_options)  # Read now, before any work.


def _do(a, point):
  """One point, in this process."""
  job_flags.apply(a)
  run.run_and_say(point.config, a.workdir / point.name, a.profile)


def _sweep(a, points, overrides):
  """All points, each in a process of its own; the exit code."""
  states = {p.name: _state(a, p) for p in points}
  for name, (kind, text) in states.items():
    if kind == sweep_points.REFUSED:
      print(f'{name}: {text}', file=sys.stderr, flush=True)
  jobs = [
      _job(a, p, overrides) for p in points
      if states[p.name].kind in (sweep_points.NEW, sweep_points.BEGUN)
  ]
  atomic.make_folder(a.workdir)
  codes = {}
  with (
      sweep_jobs.StopSignal() as stop,
      metrics.Progress(
          'sweep', len(points), len(points) - len(jobs), every=60
      ) as progress,
  ):
    for name, code in _run(a, jobs, stop, _watch(a, points, progress)):
      # Some phases of a run end at once when they are stopped.
      codes[name] = errors.Stopped.exit_code if stop.asked and code else code
      progress.advance()
      print(
          sweep_sheets.ended(name, a.workdir / name, codes[name]), flush=True
      )
  states = {p.name: _state(a, p) for p in points}
  print(sweep_sheets.results(a.workdir, states, codes))
  if stop.asked:
    raise errors.Stopped('Stopped; the same command goes on.')
  failed = [
      n for n, s in states.items() if s.kind != sweep_points.FINISHED
  ]
  for name in failed:
    print(f'gemma-qat sweep: {name} is not finished: '
          f'{sweep_sheets.reason(a.workdir / name, states[name])}',
          file=sys.stderr)
  return 1 if failed else 0


def _run(a, jobs, stop, on_wait):
  if not jobs:
    return iter(())
  if a.executor:
    return sweep_cluster.run(
        jobs, a.parallel or 0, stop, on_wait, a.executor,
        sweep_cluster.options(a.cluster_options), a.workdir / _SUBMITTED,
    )
  return sweep_jobs.run(jobs, a.parallel or 1, stop, on_wait)


def _job(a, point, overrides):
  return sweep_jobs.Job(
      point.name,
      (
          sys.executable, '-m', 'gemma_qat', 'sweep', f'--config={a.config}',
          f'--workdir={a.workdir}', *overrides, f'--point={point.name}',
          *([f'--profile={a.profile}'] if a.profile else ()),
      ),
      a.workdir / point.name / run_folders.LOG,
  )


def _state(a, point):
  return sweep_points.state(point, a.workdir / point.name)


def _watch(a, points, progress):
  """Says now and then how far the points are that run."""
  steps = {p.name: p.config.train.steps for p in points}
  last = time.monotonic()

  def on_wait(names):
    nonlocal last
    if time.monotonic() - last < _EVERY:
      return
    last = time.monotonic()
    rows = {n: metrics.read(a.workdir / n) for n in names}
    progress.advance(0, ', '.join(
        f'{n} {r[-1]["step"] if r else 0}/{steps[n]}' for n, r in rows.items()
    ))

  return on_wait
