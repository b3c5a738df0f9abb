"""The page of what runs survive says what was lost; so does the comparison."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.reliability import commands
from experiments.reliability import page
from gemma_qat.training import metrics
from gemma_qat.training import saving
from gemma_qat.training import step as step_lib


def _row(*details):
  return {
      'trials': len(details), 'lost': sum(bool(lost) for _, lost in details),
      'details': [list(d) for d in details], 'seconds': 30,
      'device': '2-core CPU', 'git': 'a' * 40, 'seed': 0,
  }


def test_the_page_counts_trials_and_losses(tmp_path, capsys):
  page.write(tmp_path, {
      'kill -9, any time': _row(('SIGKILL after 3 rows', ''),
                                ('SIGKILL after 9 rows', 'exit code 1')),
      'a flipped bit in the newest checkpoint': _row(
          ('student/d/1: noticed', ''), ('descriptor: made no difference', ''),
      ),
  })
  text = (tmp_path / 'reliability.md').read_text()
  assert '| kill -9, any time | 2 | 1 | 1 | 15 |' in text
  assert '| all | 4 | 3 | 1 |  |' in text
  assert 'Of 2 damages to a checkpoint 1 were noticed' in text
  assert '4 trials, 1 lost' in capsys.readouterr().out


def test_the_page_takes_what_lies_beside_it(tmp_path):
  (tmp_path / 'fuzz.md').write_text('| reader |\n')
  (tmp_path / 'soak.json').write_text(json.dumps({
      'steps': 2400.0, 'evaluate_and_save_every': 20,
      'rss_mb_per_1000_steps': 25.5, 'metrics_kb_per_1000_steps': 33.3,
      'events_kb_per_1000_steps': 44.6, 'open_files_last_minus_warm': 0.0,
      'threads_last_minus_warm': -1.0, 'cpu_time_last_to_second_quarter': 1.02,
  }))
  page.write(tmp_path, {'a full disk': _row(('3 KiB of 9', ''))})
  text = (tmp_path / 'reliability.md').read_text()
  assert '## Damaged files' in text and 'memory +25.5 MB' in text


@pytest.fixture(scope='module')
def trained_step(tmp_path_factory):
  """A workdir that holds a last step and nothing else."""
  folder = tmp_path_factory.mktemp('run') / 'workdir'
  folder.mkdir()
  state = step_lib.init_state({'norm': jnp.ones(3)}, optax.adam(0.1))
  with saving.Saver(folder, keep=1) as saver:
    saver.save(
        state._replace(step=jnp.int32(commands.STEPS)), {}, {'text': 'a'},
        {'bytes': np.zeros(3, np.uint8)},
    )
  return folder


@pytest.mark.parametrize('rows, is_whole', [
    (range(commands.STEPS + 1), True),
    ([*range(5), *range(4, commands.STEPS + 1)], False),
    ([n for n in range(commands.STEPS + 1) if n != 7], False),
])
def test_a_step_that_is_missing_or_twice_is_a_loss(
    trained_step, tmp_path, rows, is_whole
):
  for name, numbers in (('one', range(commands.STEPS + 1)), ('two', rows)):
    shutil.copytree(trained_step, tmp_path / name)
    (tmp_path / name / metrics.FILE).write_text(''.join(
        json.dumps({'step': n, 'kl_nats': float(np.float32(1 / (n + 1)))}) + '\n'
        for n in numbers
    ))
  found = commands.differences(tmp_path / 'one', tmp_path / 'two')
  assert bool(found) != is_whole
