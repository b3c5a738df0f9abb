"""Are the plots real pictures that show the numbers given?"""

from matplotlib import image
import numpy as np
import pytest

from gemma_qat.reporting import plots
from tests.reporting import sample

_RGB = {
    'blue': (0x00, 0x72, 0xB2), 'orange': (0xD5, 0x5E, 0x00),
    'grey': (0x7F, 0x7F, 0x7F),
}


def _read(path):
  assert path.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
  pixels = image.imread(path)
  height, width = pixels.shape[:2]
  assert width == 1200 and 500 <= height <= 1000
  return np.round(pixels[..., :3] * 255).astype(int)


def _mask(pixels, color):
  return (abs(pixels - _RGB[color]) <= 2).all(axis=-1)


def _has_labels(pixels):
  """Ink in the strips left of and below the axes, where labels stand."""
  dark = (pixels < 128).all(axis=-1)
  return dark[:, :30].any() and dark[-30:].any()


def test_loss_plot_shows_both_curves_and_labels(tmp_path):
  plots.plot_loss(sample.rows(), tmp_path / 'loss.png')
  pixels = _read(tmp_path / 'loss.png')
  assert _has_labels(pixels)
  for color in _RGB:  # Grey is the learning rate's.
    assert _mask(pixels, color).sum() > 200, color


@pytest.mark.parametrize('rows', [
    sample.rows()[1:2],  # One step, no held-out text.
    [{'step': 2, 'tokens': 64.0, 'kl_nats': 0.031, 'learning_rate': 1e-3},
     {'step': 3, 'heldout_kl_nats': 0.030}],
])
def test_loss_plot_of_a_very_short_run_is_drawn_too(tmp_path, rows):
  plots.plot_loss(rows, tmp_path / 'loss.png')
  pixels = _read(tmp_path / 'loss.png')
  assert _has_labels(pixels)
  # The one training point, left of the legend in the right-hand corner.
  assert _mask(pixels[:, :700], 'orange').any()


def _bar_heights(pixels, color):
  """Longest vertical run of the colour, left and right of the middle third."""
  mask = _mask(pixels, color)
  return [int(part.sum(axis=0).max()) for part in
          (mask[:, :690], mask[:, 790:])]


def test_bars_are_as_long_as_their_values(tmp_path):
  plots.plot_fidelity(sample.make_report(), tmp_path / 'fidelity.png')
  pixels = _read(tmp_path / 'fidelity.png')
  assert _has_labels(pixels)
  base = _bar_heights(pixels, 'grey')[0]
  ptq, kld_ptq = _bar_heights(pixels, 'orange')
  qat, kld_qat = _bar_heights(pixels, 'blue')
  assert base / ptq == pytest.approx(14 / 22, abs=0.01)
  assert qat / ptq == pytest.approx(15 / 22, abs=0.01)
  assert kld_qat / kld_ptq == pytest.approx(0.25, abs=0.01)


def test_plot_of_a_report_without_shares_is_drawn(tmp_path):
  r = sample.make_report(
      sample.fidelities(ptq=13.0, kld_ptq=0.0), model='a/long/path/' * 20
  )
  plots.plot_fidelity(r, tmp_path / 'fidelity.png')
  assert _has_labels(_read(tmp_path / 'fidelity.png'))
