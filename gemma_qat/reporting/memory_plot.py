"""What does the memory of every size and format look like beside cards?"""

from collections.abc import Sequence
import os

from matplotlib import figure
from matplotlib import ticker

from gemma_qat.reporting import gpus
from gemma_qat.reporting import memory

_DPI = 150
_WIDTH = 8.0  # inches: 1,200 pixels.
# Okabe and Ito's palette, as in `plots`.
_GREY, _ORANGE, _BLUE, _SKY = '#7f7f7f', '#d55e00', '#0072b2', '#56b4e9'
_PARTS = (
    ('weights', _BLUE, lambda e: e.weights.tensors),
    ('vision tower', _SKY, lambda e: e.vision),
    ('KV cache', _ORANGE, lambda e: e.cache.total),
    ('reserve', '#c8c8c8', lambda e: e.reserve),
)
_SMALL = 8  # points.

# What is drawn of all formats: more bars would be read by nobody.
PLOTTED = (
    ('bf16', 'bf16'), ('q8_0', 'q8_0'), ('q4_0', 'f16'), ('q4_0', 'q8_0'),
    ('q4_0', 'q4_0'), ('int4', 'int4'),
)


def plot_memory(
    found: Sequence[memory.Estimate],
    path: str | os.PathLike,
    card: gpus.Card | None = None,
) -> None:
  """Draws weights, KV cache and reserve as bars, cards as lines.

  Args:
    found: the models; those of one size share a panel with its own scale.
    path: PNG file to write.
    card: drawn alone instead of the common ones.
  """
  panels = {}
  for e in found:
    panels.setdefault(e.config.variant, []).append(e)
  rows = [len(group) for group in panels.values()]
  drawing = figure.Figure(
      figsize=(_WIDTH, 1.2 + 0.2 * sum(rows) + 0.45 * len(rows)), dpi=_DPI,
      layout='constrained',
  )
  all_axes = drawing.subplots(
      len(rows), 1, squeeze=False,
      gridspec_kw={'height_ratios': [n + 0.6 for n in rows]},
  )[:, 0]
  for axes, (size, group) in zip(all_axes, panels.items()):
    _draw_bars(axes, group)
    ends = [e.total for e in group] + ([card.num_bytes] if card else [])
    axes.set_xlim(0, 1.1 * max(ends) / 1e9)
    _draw_cards(axes, card)
    axes.set_ylabel(
        size, rotation=0, ha='left', va='center', fontweight='bold',
        labelpad=52,
    )
  all_axes[-1].set_xlabel(
      'GB (10^9 bytes), a scale for each size; dashed: cards',
      fontsize=_SMALL + 1,
  )
  names = dict(zip(*reversed(all_axes[-1].get_legend_handles_labels())))
  drawing.legend(
      names.values(), names.keys(), loc='outside lower center', ncols=4,
      frameon=False,
  )
  cache = max(e.cache.global_tokens for e in found)
  drawing.suptitle(
      f'Gemma 3 in memory, with {cache:,} tokens', x=0.01, ha='left',
      fontsize=12,
  )
  drawing.savefig(path, format='png')


def _draw_bars(axes, group):
  """Stacks the parts of each model, the total at the end."""
  places = range(len(group))
  starts = [0.0] * len(group)
  for name, color, size in _PARTS:
    values = [size(e) / 1e9 for e in group]
    if any(values):
      axes.barh(places, values, 0.8, starts, color=color, label=name, zorder=2)
    starts = [a + b for a, b in zip(starts, values)]
  for y, end in zip(places, starts):
    axes.annotate(
        f'{end:.1f}', (end, y), xytext=(3, 0), textcoords='offset points',
        va='center', fontsize=_SMALL, zorder=4,
        bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.5},
    )
  axes.set_yticks(places, [_label(e) for e in group], fontsize=_SMALL)
  axes.invert_yaxis()
  axes.xaxis.set_major_locator(ticker.MaxNLocator(8))
  axes.spines[['top', 'right']].set_visible(False)
  axes.tick_params(axis='y', length=0)
  axes.tick_params(axis='x', labelsize=_SMALL)


def _label(e):
  if e.layout == e.embedding:
    return e.layout
  return f'{e.layout}, {e.embedding} embedding'


def _draw_cards(axes, card):
  """Draws a line for every card within the axis, its memory above it."""
  cards = [card] if card else [
      gpus.Card('', gib * gpus.GIB) for gib in gpus.COMMON
  ]
  right = axes.get_xlim()[1]
  last = float('inf')
  # Largest first, and no names over one another: small cards give way.
  for one in reversed(cards):
    x = one.num_bytes / 1e9
    if x < right and last - x > 0.08 * right:
      last = x
      axes.axvline(x, color=_GREY, linestyle='--', linewidth=0.8, zorder=3)
      axes.annotate(
          one.name or f'{one.num_bytes / gpus.GIB:.4g} GiB', (x, 1),
          xycoords=('data', 'axes fraction'), xytext=(0, 1),
          textcoords='offset points', ha='center', va='bottom',
          fontsize=_SMALL, color=_GREY,
      )
