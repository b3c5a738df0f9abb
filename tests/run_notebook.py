"""Runs a notebook's code cells in one namespace, without Jupyter.

  MPLBACKEND=Agg python tests/run_notebook.py NOTEBOOK [FIGURES [PARAMETERS]]

PARAMETERS is a JSON object whose values replace those of the cell tagged
'parameters'; every figure that a cell draws is written to FIGURES.
"""

import json
import pathlib
import sys

from matplotlib import pyplot as plt


def main(notebook, figures=None, parameters='{}'):
  cells = json.loads(pathlib.Path(notebook).read_text('utf-8'))['cells']
  namespace = {'__name__': '__main__'}
  for i, cell in enumerate(cells):
    if cell['cell_type'] != 'code':
      continue
    # Its number in the notebook stands in a traceback.
    program = compile(''.join(cell['source']), f'cell {i}', 'exec')
    exec(program, namespace)  # pylint: disable=exec-used
    if 'parameters' in cell['metadata'].get('tags', ()):
      namespace |= json.loads(parameters)
    for number in plt.get_fignums() if figures else ():
      plt.figure(number).savefig(
          pathlib.Path(figures) / f'cell_{i:02}_{number}.png'
      )
    # As Jupyter does once it has shown them.
    plt.close('all')


if __name__ == '__main__':
  main(*sys.argv[1:])
