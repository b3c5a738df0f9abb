"""Set finished runs side by side: a table, plots, one page for a browser.

WORKDIRs are those of gemma-qat run, or of gemma-qat sweep: then all points in
them. Runs that differ only in their seed are one row, mean ± deviation.
"""

import argparse
import pathlib

from gemma_qat import errors
from gemma_qat.checkpoints import atomic
from gemma_qat.commands import run_folders
from gemma_qat.reporting import comparison
from gemma_qat.reporting import comparison_plots
from gemma_qat.reporting import page
from gemma_qat.reporting import points

_DRAW = {
    'heldout': comparison_plots.plot_heldout,
    'size': comparison_plots.plot_size,
}


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
      'gemma-qat report', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('workdirs', nargs='+', type=pathlib.Path,
                      metavar='WORKDIR')
  parser.add_argument(
      '--to', type=pathlib.Path, metavar='DIR',
      help=f'receives {comparison.MARKDOWN}, {comparison.PAGE} and the plots '
      '(default: the folder of the sweep)')
  a = parser.parse_args(argv)
  to = a.to or a.workdirs[0]
  if a.to is None and len(a.workdirs) > 1:
    raise errors.UserError('Give --to=DIR: there are several workdirs.')
  found = run_folders.collect(a.workdirs)
  if run_folders.is_run(to):
    raise errors.UserError(
        f'{to} has a report of its own: give --to=DIR, another folder.'
    )
  write(found, to)
  unfinished = sum(p.report is None for p in found)
  print(f'Runs: {len(found)}, of which not finished: {unfinished}.\n'
        f'The report: {to / comparison.MARKDOWN}\n'
        f'The page:   {to / comparison.PAGE}')
  return 0


def write(found: list[points.Point], to: pathlib.Path) -> None:
  """Writes report, page and plots of some runs into a folder."""
  groups = points.group(found)
  finished = [g for g in groups if g.points[0].report is not None]
  # The finished ones first: a group has the same colour in both plots.
  others = [g for g in groups if g not in finished and g.points[0].heldout]
  drawn = {'heldout': finished + others, 'size': finished}
  made = comparison.make(groups)
  atomic.make_folder(to)
  files, images = {}, {}
  for name, some in drawn.items():
    if some:
      files[name] = comparison.PLOTS[name]
      with atomic.whole_file(to / files[name]) as path:
        _DRAW[name](some, path)
      images[name] = (to / files[name]).read_bytes()
  with atomic.whole_file(to / comparison.MARKDOWN) as path:
    path.write_text(
        comparison.render_markdown(made, files), encoding='utf-8'
    )
  with atomic.whole_file(to / comparison.PAGE) as path:
    path.write_text(page.render(made, images), encoding='utf-8')
