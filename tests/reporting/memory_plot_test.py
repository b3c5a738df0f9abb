"""Bars are as long as the bytes they stand for."""

from matplotlib import image
import numpy as np
import pytest

from gemma_qat.model import config as model_config
from gemma_qat.reporting import gpus
from gemma_qat.reporting import memory
from gemma_qat.reporting import memory_plot
from gemma_qat.reporting import memory_table

_BLUE, _ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def _longest(pixels, color):
  """Longest horizontal run of a colour, legend aside."""
  mask = (abs(pixels - color) <= 2).all(axis=-1)
  return int(mask[: -len(mask) // 4].sum(axis=1).max())


def test_weights_and_cache_have_their_lengths(tmp_path):
  use = memory.Use(context=32_768)
  found = memory.estimate(model_config.variant('12b'), use=use)
  memory_plot.plot_memory([found], tmp_path / 'x.png', gpus.parse('16GB'))
  raw = image.imread(tmp_path / 'x.png')
  assert raw.shape[1] == 1200
  pixels = np.round(raw[..., :3] * 255).astype(int)
  assert _longest(pixels, _ORANGE) / _longest(pixels, _BLUE) == pytest.approx(
      found.cache.total / found.weights.tensors, abs=0.02
  )


def test_all_sizes_and_formats_are_drawn(tmp_path):
  found = memory_table.estimates()
  memory_plot.plot_memory(found, tmp_path / 'x.png')
  few = [f for f in found if f.config.variant == '1b']
  memory_plot.plot_memory(few, tmp_path / 'y.png')
  heights = [image.imread(tmp_path / n).shape[0] for n in ('x.png', 'y.png')]
  assert heights[0] > 3 * heights[1]
  assert set(memory_plot.PLOTTED) <= set(memory_table.LINES)
