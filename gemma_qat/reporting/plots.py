"""What does a run look like?

Figures are objects of their own (no pyplot), so that drawing leaves no state
behind and needs no display.
"""

from collections.abc import Mapping, Sequence
import os
from typing import Any

from matplotlib import axes as axes_lib
from matplotlib import figure
from matplotlib import ticker
import numpy as np

from gemma_qat.reporting import tables

DPI = 150
WIDTH = 8.0  # inches: 1,200 pixels.
# Okabe and Ito's palette: told apart with every kind of colour blindness.
_GREY, _ORANGE, _BLUE = '#7f7f7f', '#d55e00', '#0072b2'
_LABELS = {'base': 'base', 'ptq': 'PTQ Q4_0', 'qat': 'QAT Q4_0'}
_COLORS = {'base': _GREY, 'ptq': _ORANGE, 'qat': _BLUE}


def plot_loss(
    rows: Sequence[Mapping[str, float]], path: str | os.PathLike
) -> None:
  """Draws the KL of training and held-out text, and the learning rate.

  Args:
    rows: of `metrics.jsonl`; each needs 'step' and may have 'kl_nats',
      'heldout_kl_nats', 'learning_rate' and 'tokens'.
    path: PNG file to write.
  """
  drawing = figure.Figure(
      figsize=(WIDTH, 5.4), dpi=DPI, layout='constrained'
  )
  loss, rate = drawing.subplots(
      2, 1, sharex=True, gridspec_kw={'height_ratios': [4, 1]}
  )
  tokens, kl = _series(rows, 'kl_nats')
  window = max(1, len(kl) // 20)
  if window > 1:
    loss.plot(
        tokens, kl, color=_ORANGE, alpha=0.3, linewidth=1,
        label='training, each logged batch',
    )
  label = f'training, mean of {window} logged batches'
  loss.plot(
      tokens, _smooth(kl, window), color=_ORANGE, linewidth=2,
      # A line through a single point would be nothing at all.
      marker='o' if len(kl) < 10 else None, markersize=5,
      label=label if window > 1 else 'training, each logged batch',
  )
  heldout_tokens, heldout = _series(rows, 'heldout_kl_nats')
  loss.plot(
      heldout_tokens, heldout, color=_BLUE, marker='o', markersize=5,
      linewidth=1, linestyle='--', label='held-out text',
  )
  if len(heldout):
    # In the margin on the right, where no curve runs.
    loss.annotate(
        f'{heldout[-1]:.4f}', (heldout_tokens[-1], heldout[-1]), color=_BLUE,
        xytext=(8, 0), textcoords='offset points', va='center',
    )
    loss.margins(x=0.09)
  log_axis(loss, np.concatenate([kl, heldout]))
  loss.set_ylabel('KL to the teacher\n(nats a token, log scale)')
  loss.set_title('Distillation loss', loc='left')
  loss.legend(frameon=False)

  rate.plot(*_series(rows, 'learning_rate'), color=_GREY, linewidth=2)
  rate.set_ylim(bottom=0)
  rate.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
  rate.set_ylabel('learning\nrate')
  rate.set_xlabel('training tokens')
  rate.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  drawing.align_ylabels()
  for axes in (loss, rate):
    tidy(axes)
    axes.grid(True, color='#e5e5e5', linewidth=0.8)
  drawing.savefig(path, format='png')


def plot_fidelity(report: Mapping[str, Any], path: str | os.PathLike) -> None:
  """Draws perplexity and KL divergence of base, PTQ and QAT.

  Args:
    report: from `report.make_report`.
    path: PNG file to write.
  """
  drawing = figure.Figure(
      figsize=(WIDTH, 4.2), dpi=DPI, layout='constrained'
  )
  left, right = drawing.subplots(
      1, 2, gridspec_kw={'width_ratios': [3, 2]}
  )
  _bars(left, report['ppl'], report['ppl_stderr'], tables.perplexity)
  left.axhline(
      report['ppl']['base'], color=_GREY, linestyle='--', linewidth=1, zorder=0
  )
  left.set_ylabel('perplexity (± standard error)')
  left.yaxis.set_major_formatter(ticker.StrMethodFormatter('{x:,g}'))
  _title(left, 'Perplexity', report['recovered_ppl'])
  _bars(right, report['kld'], report['kld_stderr'], tables.nats)
  right.set_ylabel('mean KL from the base (nats a token)')
  _title(right, 'KL divergence', report['recovered_kld'])
  drawing.suptitle(
      f'{report["model"]} on {report["text"]}: {report["chunks"]} chunks of '
      f'{report["context"]} tokens, {report["engine"]}',
      fontsize=9, color='#555555', wrap=True,
  )
  drawing.savefig(path, format='png')


def tidy(axes: axes_lib.Axes) -> None:
  """Takes away the frame's upper and right line."""
  axes.spines[['top', 'right']].set_visible(False)


def log_axis(axes: axes_lib.Axes, values: Sequence[float]) -> None:
  """Sets a log scale with ticks that read as plain numbers."""
  axes.set_yscale('log')
  # Within less than two octaves, 1-2-5 would leave one tick or none.
  narrow = len(values) > 0 and max(values) < 4 * min(values)
  axes.yaxis.set_major_locator(
      ticker.MaxNLocator(6) if narrow else ticker.LogLocator(subs=(1, 2, 5))
  )
  axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f'{y:g}'))
  axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _bars(axes, values, errors, write):
  names = [n for n in values if values[n] is not None]
  heights = [values[n] for n in names]
  deviations = [errors[n] or 0.0 for n in names]
  axes.bar(
      [_LABELS[n] for n in names], heights, yerr=deviations, capsize=5,
      width=0.6, color=[_COLORS[n] for n in names],
      error_kw={'elinewidth': 1.2, 'ecolor': '#222222'},
  )
  for i, (height, deviation) in enumerate(zip(heights, deviations)):
    axes.annotate(
        write(height), (i, height + deviation), xytext=(0, 3),
        textcoords='offset points', ha='center', fontweight='bold',
    )
  # From 0, so that lengths compare; with room for the labels.
  tops = [h + d for h, d in zip(heights, deviations)]
  axes.set_ylim(0, 1.12 * max([1e-9, *tops]))
  tidy(axes)


def _title(axes, name, recovered):
  share = (
      'PTQ lost nothing' if recovered is None
      else f"won back: {tables.percent(recovered)} of PTQ's loss"
  )
  axes.set_title(f'{name}\n{share}', loc='left', fontsize=11)


def _series(rows, key):
  """Returns (tokens [N], values [N]) of the rows that have the key."""
  # Rows of an evaluation alone, as that of step 0, do not count their tokens.
  a_step = next(
      (r['tokens'] / r['step'] for r in rows if 'tokens' in r and r['step']),
      1.0,
  )
  pairs = [(r['step'] * a_step, r[key]) for r in rows if key in r]
  return np.array(pairs, np.float64).reshape(-1, 2).T


def _smooth(values, window):
  """Centred running mean; at the ends, of what there is."""
  if window < 2:
    return values
  ones = np.ones(window)
  counts = np.convolve(np.ones_like(values), ones, 'same')
  return np.convolve(values, ones, 'same') / counts
