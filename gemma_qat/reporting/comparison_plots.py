"""What do several runs look like in one picture?"""

from collections.abc import Sequence
import os

from matplotlib import figure
from matplotlib import ticker
import numpy as np

from gemma_qat.reporting import plots
from gemma_qat.reporting import points as points_lib

# Okabe and Ito's palette without black and yellow, which a page's two schemes
# would swallow; beyond it the lines are dashed.
_COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')
_LINES = ('-', '--', ':', '-.')
_MARKERS = 'osD^vP*h'
_PTQ = '#7f7f7f'


def plot_heldout(
    groups: Sequence[points_lib.Group], path: str | os.PathLike
) -> None:
  """Draws the held-out KL of each group over the training tokens.

  Args:
    groups: those that have not measured it are left out.
    path: PNG file to write.
  """
  drawing, axes = _drawing(groups)
  everything = []
  for i, group in enumerate(groups):
    tokens, kl, spread = curve(group)
    if not len(tokens):
      continue
    everything += list(kl)
    color, line = _style(i)
    axes.plot(
        tokens, kl, color=color, linestyle=line, linewidth=2,
        marker=_MARKERS[i % len(_MARKERS)], markersize=5, label=_label(group),
    )
    if spread.any():
      axes.fill_between(
          tokens, np.maximum(kl - spread, 1e-3 * kl), kl + spread,
          color=color, alpha=0.2, linewidth=0,
      )
  plots.log_axis(axes, everything)
  axes.set_xlabel('training tokens')
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  axes.set_ylabel('held-out KL to the teacher\n(nats a token, log scale)')
  axes.set_title('Held-out KL', loc='left')
  _finish(drawing, axes, path)


def plot_size(
    groups: Sequence[points_lib.Group], path: str | os.PathLike
) -> None:
  """Draws the KL of each finished group over the bytes of its file.

  Args:
    groups: all finished.
    path: PNG file to write.
  """
  drawing, axes = _drawing(groups)
  everything = []
  for i, group in enumerate(groups):
    size, kl, ptq = (
        points_lib.mean(group, k) for k in ('bytes.qat', 'kld.qat', 'kld.ptq')
    )
    axes.errorbar(
        size[0] / 1e6, kl[0], yerr=kl[1] or None, color=_style(i)[0],
        marker=_MARKERS[i % len(_MARKERS)], markersize=9, capsize=4,
        linestyle='none', label=_label(group),
    )
    axes.plot(
        points_lib.mean(group, 'bytes.ptq')[0] / 1e6, ptq[0], color=_PTQ,
        marker='x', markersize=8, linestyle='none',
        # Once in the legend.
        label='PTQ of the same formats' if i == 0 else None,
    )
    everything += [kl[0], ptq[0]]
  plots.log_axis(axes, [x for x in everything if x > 0])
  axes.margins(x=0.15)
  low, high = axes.get_xlim()
  if high - low < 0.02 * high:
    # One size for all: a scale of a few kilobytes would suggest differences.
    axes.set_xlim(0.9 * low, 1.1 * high)
  axes.set_xlabel('size of the file (MB)')
  axes.set_ylabel('KL from the base\n(nats a token, log scale)')
  axes.set_title('Quality against size', loc='left')
  _finish(drawing, axes, path)


def curve(
    group: points_lib.Group,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The held-out KL of a group, at the tokens where all of its runs have it.

  Returns:
    (tokens [N], mean [N], sample standard deviation [N], 0 for one run).
  """
  runs = [dict(p.heldout) for p in group.points]
  shared = sorted(set(runs[0]).intersection(*runs[1:]))
  values = np.array([[r[t] for t in shared] for r in runs], np.float64)
  spread = np.zeros(len(shared))
  if len(runs) > 1:
    spread = values.std(axis=0, ddof=1)
  return np.array(shared, np.float64), values.mean(axis=0), spread


def _drawing(groups):
  # A line of the legend, below the axes, takes about a quarter of an inch.
  rows = (len(groups) + 2) // 2
  drawing = figure.Figure(
      figsize=(plots.WIDTH, 4.4 + 0.25 * rows), dpi=plots.DPI,
      layout='constrained',
  )
  return drawing, drawing.subplots()


def _style(i):
  return _COLORS[i % len(_COLORS)], _LINES[i // len(_COLORS) % len(_LINES)]


def _label(group):
  n = len(group.points)
  more = [f'{n} seeds'] if n > 1 else []
  if group.points[0].report is None:
    more += ['not finished']
  return group.name + (f' ({", ".join(more)})' if more else '')


def _finish(drawing, axes, path):
  plots.tidy(axes)
  axes.grid(True, color='#e5e5e5', linewidth=0.8)
  drawing.legend(loc='outside lower center', ncols=2, frameon=False)
  drawing.savefig(path, format='png')
