"""Do the curves follow from the runs, and are the pictures drawn?"""

from matplotlib import image
import numpy as np
import pytest

from gemma_qat.reporting import comparison_plots
from gemma_qat.reporting import points
from tests.reporting import sample_points

# The first two colours of the palette.
_BLUE, _ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def _ink(path, color):
  pixels = np.round(image.imread(path)[..., :3] * 255).astype(int)
  return int((abs(pixels - color) <= 2).all(axis=-1).sum())


def test_a_curve_is_mean_and_deviation_at_the_tokens_of_all_seeds():
  gptq, reference, search = points.group(sample_points.sweep())
  tokens, kl, spread = comparison_plots.curve(gptq)
  # Steps 0, 40, 80 and 120 of 2 x 256 tokens.
  np.testing.assert_array_equal(tokens, [0, 20_480, 40_960, 61_440])
  np.testing.assert_allclose(kl, [0.6, 0.2, 0.2, 0.2])
  np.testing.assert_allclose(spread, [0.15, 0.05, 0.05, 0.05])
  assert not comparison_plots.curve(reference)[2].any()
  assert len(comparison_plots.curve(search)[0]) == 2


def test_seeds_of_which_one_is_younger_share_its_tokens():
  (group,) = points.group([
      sample_points.point('a', is_finished=False, seed=0),
      points.make_point('b', sample_points.CONFIG | {'seed': 1},
                        [{'step': 0, 'heldout_kl_nats': 0.8}], None, ''),
  ])
  tokens, kl, _ = comparison_plots.curve(group)
  assert list(tokens) == [0] and kl == pytest.approx([0.7])


def test_both_plots_show_every_group(tmp_path):
  groups = points.group(sample_points.sweep()[:4])
  for draw in (comparison_plots.plot_heldout, comparison_plots.plot_size):
    path = tmp_path / 'plot.png'
    draw(groups, path)
    assert path.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    assert _ink(path, _BLUE) > 200 and _ink(path, _ORANGE) > 200


def test_many_groups_and_one_without_figures_are_drawn(tmp_path):
  some = [
      sample_points.point(f'p{i}', 0.1 + 0.01 * i, train__steps=i)
      for i in range(14)
  ]
  empty = points.make_point(
      'none', sample_points.CONFIG, [], sample_points.report(0.0), 'finished'
  )
  groups = points.group([*some, empty])
  comparison_plots.plot_heldout(groups, tmp_path / 'a.png')
  comparison_plots.plot_size(groups, tmp_path / 'b.png')
  assert (tmp_path / 'a.png').stat().st_size
  assert (tmp_path / 'b.png').stat().st_size
