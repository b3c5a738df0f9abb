"""What does PyTorch need for the same step? The other side of pytorch_step.py.

Runs in an environment of its own (torch, transformers, torchao; no jax): reads
one line of JSON of sizes, builds the step, says what it built in a line, and
then takes one step for each line that it reads, answering with its loss.

What it is: transformers' Gemma 3 text model with random weights, its layers'
linear modules prepared by torchao's QATConfig for int4 weights in groups of 32,
trained by fused AdamW to the KL divergence from a frozen teacher; the tied
embedding stands still, as in our step.
"""

import json
import sys
import time

import torch
from torch.nn import functional
from torch.utils import checkpoint
import torchao
from torchao import quantization
from torchao.quantization import qat
import transformers

_GROUP = 32


def main():
  asked = json.loads(sys.stdin.readline())
  # What libraries print must not get between the lines of the answers.
  answers, sys.stdout = sys.stdout, sys.stderr
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  step, built = make_step(asked, device)
  step()
  answers.write(json.dumps(built) + '\n')
  answers.flush()
  for _ in sys.stdin:
    loss = step()
    answers.write(json.dumps({
        'loss': float(loss),
        'process_time': time.process_time(),
        'peak_gb': torch.cuda.max_memory_allocated() / 1e9
        if device == 'cuda' else None,
    }) + '\n')
    answers.flush()


def make_step(asked, device):
  """Returns (a function that takes a step, what was built, in words)."""
  torch.manual_seed(0)
  dtype = getattr(torch, asked['dtype'])
  build = lambda: transformers.Gemma3TextModel(
      transformers.Gemma3TextConfig(
          **asked['config'], attn_implementation=asked['attention']
      )
  ).to(device, dtype)
  student, teacher = build(), build().eval().requires_grad_(False)
  student.embed_tokens.requires_grad_(False)
  student.train()
  quantization.quantize_(student, qat.QATConfig(
      quantization.Int4WeightOnlyConfig(group_size=_GROUP), step='prepare'
  ))
  fake = sum(isinstance(m, qat.FakeQuantizedLinear) for m in student.modules())
  if not fake:
    raise RuntimeError('torchao prepared no linear module.')
  if asked['recompute']:
    student.gradient_checkpointing_enable({'use_reentrant': False})
  student_forward, teacher_forward, kl = student, teacher, _kl
  if asked['compile']:
    student_forward, teacher_forward, kl = (
        torch.compile(f) for f in (student, teacher, _kl)
    )
  optimizer = torch.optim.AdamW(
      [p for p in student.parameters() if p.requires_grad], lr=1e-5,
      weight_decay=0.0, fused=True,
  )
  tokens = torch.randint(
      3, asked['config']['vocab_size'], asked['rows'], device=device
  )
  head, teacher_head = student.embed_tokens.weight, teacher.embed_tokens.weight

  def step():
    with torch.no_grad():
      target = teacher_forward(tokens, use_cache=False).last_hidden_state
    hidden = student_forward(tokens, use_cache=False).last_hidden_state
    loss = _mean_kl(
        kl, hidden.flatten(0, 1), target.flatten(0, 1), head, teacher_head,
        asked['chunk'],
    )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device == 'cuda':
      torch.cuda.synchronize()
    return loss.detach()

  return step, {
      'torch': torch.__version__, 'torchao': torchao.__version__,
      'transformers': transformers.__version__, 'device': device,
      'threads': torch.get_num_threads(), 'fake_quantized': fake,
  }


def _mean_kl(kl, hidden, target, head, teacher_head, chunk):
  """The mean over tokens; logits of `chunk` tokens at a time, 0 for all."""
  if not chunk:
    return kl(hidden, target, head, teacher_head) / len(hidden)
  total = 0.0
  for h, t in zip(hidden.split(chunk), target.split(chunk)):
    # Logits are computed again on the way back instead of being kept.
    total = total + checkpoint.checkpoint(
        kl, h, t, head, teacher_head, use_reentrant=False
    )
  return total / len(hidden)


def _kl(hidden, target, head, teacher_head):
  log_q = functional.log_softmax((hidden @ head.T).float(), -1)
  log_p = functional.log_softmax((target @ teacher_head.T).float(), -1)
  return functional.kl_div(log_q, log_p, reduction='sum', log_target=True)


if __name__ == '__main__':
  main()
