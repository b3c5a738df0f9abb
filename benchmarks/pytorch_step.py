"""Claim: a step takes fewer seconds here than in PyTorch, on the same device.

Other is benchmarks/pytorch_side.py, which says what it runs: a second process
in an environment of its own (`pip install torch torchao transformers`). Both
take steps in turn; each waits while the other computes.

  python -m benchmarks.pytorch_step --torch_python=.venv-torch/bin/python
  python -m benchmarks.pytorch_step --torch_python=.venv-torch/bin/python \
      --size=1b --layers=0 --vocabulary=0 --tokens=8192 --length=1024 \
      --remat=products --dtype=bfloat16 --chunk=1024 --torch_compile

Both train the linear weights and the norms (ours straight-through, mode
`derived`), the embedding stands still. Ours keeps float32 masters and moments;
PyTorch's are of --dtype, which with bfloat16 is less to do.
"""

import dataclasses
import json
import os
import pathlib
import subprocess

from benchmarks import measure
from benchmarks import training_step
from gemma_qat import errors

# JAX would otherwise take most of a GPU's memory at once.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
_SIDE = pathlib.Path(__file__).with_name('pytorch_side.py')


def main(argv=None):
  parser = measure.make_parser(__doc__, repeats=5)
  add = parser.add_argument
  add('--torch_python', required=True, help='a Python that has torch')
  add('--torch_compile', action='store_true')
  add('--torch_attention', default='sdpa', help='sdpa, eager ...')
  add('--torch_recompute', action='store_true',
      help="checkpoint PyTorch's layers")
  add('--chunk', type=int, default=0,
      help='tokens whose logits PyTorch holds at once; 0 for all')
  training_step.add_flags(parser, layers=6, vocabulary=65_536, tokens=512)
  a = parser.parse_args(argv)
  case = training_step.make_case(a, 'derived')
  ours = training_step.Stepper(case.job.program.step, case)
  with Other(a) as other:
    timed = measure.interleave(ours, other, a.repeats)
    measure.emit(
        f'training step, derived, against torchao {other.built["torchao"]} '
        f'and torch {other.built["torch"]}'
        f'{", compiled" if a.torch_compile else ""}'
        f'{f", logits of {a.chunk} tokens" if a.chunk else ""}',
        training_step.describe(a),
        measure.as_rates(timed, a.tokens, 'tokens/s'),
        ours_temporary_gb=measure.temporary_gb(ours.lowered),
        other_built=other.built,
        other_peak_gb=other.last['peak_gb'],
    )


class Other:
  """PyTorch's process; a call is a step."""

  def __init__(self, a):
    rows = a.tokens // a.length, a.length
    asked = {
        'config': text_config(training_step.sizes(a)), 'rows': rows,
        'dtype': training_step.resolved_dtype(a), 'chunk': a.chunk,
        'attention': a.torch_attention, 'compile': a.torch_compile,
        'recompute': a.torch_recompute,
    }
    self._process = subprocess.Popen(
        [a.torch_python, str(_SIDE)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )
    self.built = self._ask(asked)
    self.last = {}

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._process.stdin.close()
    self._process.wait()

  def __call__(self):
    self.last = self._ask({})

  def process_time(self) -> float:
    """Processor seconds that it had used after its last step."""
    return self.last.get('process_time', 0.0)

  def _ask(self, message):
    try:
      self._process.stdin.write(json.dumps(message) + '\n')
      self._process.stdin.flush()
      return json.loads(self._process.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError) as error:
      raise errors.UserError(
          "PyTorch's process ended (its own words stand above): it needs "
          'torch, torchao and transformers, and on a GPU enough memory beside '
          'ours; --chunk= and --torch_recompute need less.'
      ) from error


def text_config(config) -> dict:
  """Returns our sizes under transformers' names."""
  c = dataclasses.asdict(config)
  names = {
      'vocab_size': 'vocab_size', 'hidden_size': 'embed_dim',
      'intermediate_size': 'mlp_dim', 'num_hidden_layers': 'num_layers',
      'num_attention_heads': 'num_heads',
      'num_key_value_heads': 'num_kv_heads', 'head_dim': 'head_dim',
      'sliding_window': 'sliding_window',
      'max_position_embeddings': 'context_length',
      'rms_norm_eps': 'norm_epsilon',
  }
  kinds = [
      'full_attention' if config.is_global(i) else 'sliding_attention'
      for i in range(config.num_layers)
  ]
  # Whole numbers at every size, also where ours are floats.
  return {theirs: c[ours] for theirs, ours in names.items()} | {
      'layer_types': kinds,
      'query_pre_attn_scalar': int(config.query_scale_dim),
  }


if __name__ == '__main__':
  main()
