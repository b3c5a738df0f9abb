"""Claim: codes and scales travel in 3.5 times fewer bytes than bfloat16.

Compiles the training step twice for simulated devices under fsdp, with
config.mesh.gather=weights and =codes, and adds up what the all-gathers of the
two programs deliver to a device in a step. The teacher's weights and both
heads travel as bfloat16 in either; the student's alone are given as well: what
is left without those.

  python -m benchmarks.fsdp_gather --size=270m --topology=gpu:4xH100
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from gemma_qat.model import config as model_config
from gemma_qat.model import flops

_CONFIG = 'experiments/configs/base.py'


def main(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--size', default='270m')
  parser.add_argument('--topology', default='gpu:4xH100')
  parser.add_argument('--fsdp', type=int, default=4)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--length', type=int, default=512)
  parser.add_argument('--config', default=_CONFIG)
  a = parser.parse_args(argv)
  found = {gather: plan(a, gather) for gather in ('weights', 'codes')}
  gathered = {
      gather: f['collectives']['all-gather']['whole_bytes']
      for gather, f in found.items()
  }
  # The only difference is what of the student's layers travels, `runs` times:
  # weights - codes = runs * (2 - 4.5 / 8) bytes a weight.
  count = flops.layer_weights(model_config.variant(a.size))
  runs = (gathered['weights'] - gathered['codes']) / (count * (2 - 4.5 / 8))
  print(json.dumps({
      'what': 'all-gathers of a step, codes against weights',
      'shapes': f'{a.size}, {a.batch} x {a.length} tokens, '
                f'fsdp {a.fsdp}, {a.topology}',
      'device': f'none: {found["codes"]["compiler"]}',
      'ours': gathered['codes'] / 1e9,
      'other': gathered['weights'] / 1e9,
      'ratio': gathered['codes'] / gathered['weights'],
      'unit': 'GB',
      'student_runs': round(runs, 3),
      'student_ours': runs * count * 4.5 / 8 / 1e9,
      'student_other': runs * count * 2 / 1e9,
  }))


def plan(a: argparse.Namespace, gather: str) -> dict:
  """Returns what `gemma-qat plan --json` says."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'plan.json'
    subprocess.run(
        [
            sys.executable, '-m', 'gemma_qat', 'plan', f'--config={a.config}',
            f'--size={a.size}', f'--topology={a.topology}', f'--json={path}',
            f'--config.mesh.fsdp={a.fsdp}', f'--config.mesh.gather={gather}',
            f'--config.train.batch_size={a.batch}',
            f'--config.train.length={a.length}',
        ],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    return json.loads(path.read_text(encoding='utf-8'))


if __name__ == '__main__':
  main()
