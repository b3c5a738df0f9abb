"""Run a finished run again from its config.json: does the same come out?

Compares the last checkpoint, metrics.jsonl, the GGUF files and report.json;
what measures time is left out. A run of gemma-qat train alone is trained again
alone. A stopped repetition goes on by the same command. Exit code: 0 the same,
1 something differs.
"""

import argparse
import pathlib
import shutil
import sys

from gemma_qat import errors
from gemma_qat.checkpoints import regular_files
from gemma_qat.commands import job_flags
from gemma_qat.commands import run
from gemma_qat.reporting import report as reporting
from gemma_qat.training import loop
from gemma_qat.training import metrics
from gemma_qat.training import origin
from gemma_qat.training import sameness
from gemma_qat.training import saving
from gemma_qat.training import workdir as workdirs

# The trained one first: it is what the run was for.
_FILES = (run.QAT, run.PTQ, run.BASE)


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
      'gemma-qat reproduce', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('workdir', type=pathlib.Path, metavar='WORKDIR',
                      help='of a finished gemma-qat run or train')
  parser.add_argument(
      '--to', type=pathlib.Path, metavar='FOLDER',
      help='receives the repetition and keeps it (default: '
      'WORKDIR.reproduced, removed when all is the same)')
  a = parser.parse_args(argv)
  config = origin.read_config(a.workdir)
  missing = _missing(a.workdir, a.workdir, config)
  if missing:
    raise errors.UserError(
        f'{a.workdir} is not finished ({missing}): let the command that began '
        'it go on first.'
    )
  to = a.to or a.workdir.resolve().with_name(
      f'{a.workdir.resolve().name}.reproduced'
  )
  _check_folder(a.workdir, to, config)
  revision = origin.read_revision(a.workdir)
  origin.check_devices(config, revision)
  _warn(a.workdir, revision)
  job_flags.keep_programs()
  if not _missing(to, a.workdir, config):
    _say(f'{to} holds a finished repetition already.')
  elif _has_files(a.workdir):
    run.run(config, to)
  else:
    loop.train(config, to)
  found = compare(a.workdir, to)
  for name, (is_same, said) in found.items():
    print(f'{name}: {"the same" if is_same else "DIFFERENT"}: {said}')
  return _conclude(found, to, is_kept=a.to is not None)


def compare(
    one: pathlib.Path, other: pathlib.Path
) -> dict[str, sameness.Verdict]:
  """Compares what two finished runs left: name -> verdict.

  What the first does not have is not compared.

  Raises:
    UserError: something of them is damaged or missing.
  """
  steps = [w / saving.FOLDER / str(_last(w)) for w in (one, other)]
  found = {
      f'checkpoint of step {steps[0].name}': sameness.compare_steps(*steps),
      metrics.FILE: sameness.compare_metrics(
          *(metrics.read(w) for w in (one, other))
      ),
  }
  for name in _FILES:
    if (one / name).is_file():
      regular_files.check(other / name)
      found[name] = sameness.compare_files(one / name, other / name)
  if (one / reporting.JSON).is_file():
    found[reporting.JSON] = sameness.compare_reports(
        *(regular_files.read_json(w / reporting.JSON) for w in (one, other))
    )
  return found


def _last(workdir):
  step = saving.latest(workdir)
  if step is None:
    raise errors.UserError(f'{workdir} holds no whole checkpoint.')
  return step


def _has_files(workdir):
  return any((workdir / n).exists() for n in (*_FILES, reporting.JSON))


def _missing(workdir, like, config):
  """What a workdir lacks that a finished run like another has, '' if nothing.
  """
  step = saving.latest(workdir)
  if step != config.train.steps:
    came = 'no step' if step is None else f'step {step}'
    return f'it came to {came} of {config.train.steps}'
  if _has_files(like) and not (workdir / reporting.JSON).is_file():
    return f'it has no {reporting.JSON}'
  return ''


def _check_folder(workdir, to, config):
  """Refuses to work in a folder that is not the repetition's."""
  if to.resolve() == workdir.resolve():
    raise errors.UserError(
        f'--to={to} is the run itself: choose another folder.'
    )
  if not to.exists():
    return
  # Locks and the revision come before the config.
  if not to.is_dir() or not (to / workdirs.CONFIG).is_file() and any(
      p.name[0] != '.' and p.name != workdirs.REVISION for p in to.iterdir()
  ):
    raise errors.UserError(
        f'{to} exists and is no run: remove it, or give --to=ANOTHER.'
    )
  workdirs.is_begun(to, config)  # Raises if another config did.
  began = origin.changes(origin.read_revision(to))
  if began:
    raise errors.UserError(
        f'{to} holds a repetition that began otherwise ({"; ".join(began)}): '
        'remove it, or give --to=ANOTHER.'
    )


def _warn(workdir, revision):
  if not revision:
    _say(f'Warning: {workdir} does not say what made it (no '
         f'{workdirs.REVISION}).')
  if str(revision.get('git', '')).endswith('+'):
    _say(f'Warning: {workdir} was made by files changed since their git '
         'revision: that these are the same files cannot be checked.')
  for change in origin.changes(revision):
    _say(f'Warning: {workdir} was made otherwise: {change}.')


def _conclude(found, to, is_kept):
  """Says the result and does away with the repetition; the exit code."""
  different = [name for name, verdict in found.items() if not verdict.is_same]
  if different:
    print(f'Not the same: {", ".join(different)}. The repetition lies in {to}; '
          'to run again remove it.')
    return 1
  if not is_kept:
    shutil.rmtree(to)
  print('The same result, bit for bit. The repetition '
        + (f'lies in {to}.' if is_kept else 'was removed.'))
  return 0


def _say(text):
  print(text, file=sys.stderr, flush=True)
