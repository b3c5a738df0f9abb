"""A run whose shares can be worked out by hand: 1 - 1/8 and 1 - 1/4."""

from gemma_qat.evaluation import protocol
from gemma_qat.reporting import report


def fidelity(ppl, stderr, kld=None, q99=None, top1=None, chunks=40):
  return protocol.Fidelity(
      ppl=ppl, ppl_stderr=stderr, tokens=255 * chunks, chunks=chunks, kld=kld,
      kld_stderr=None if kld is None else kld / 50, kld_q99=q99, top1=top1,
  )


def fidelities(base=14.0, ptq=22.0, qat=15.0, kld_ptq=0.6, chunks=40):
  return {
      'base': fidelity(base, 0.301, chunks=chunks),
      'ptq': fidelity(ptq, 0.502, kld_ptq, 5.25, 0.625, chunks),
      'qat': fidelity(qat, 0.353, 0.15, 1.75, 0.8125, chunks),
  }


def make_report(measured=None, jax=None, model='gemma3-270m'):
  return report.make_report(
      model=model,
      device='2-core CPU',
      seconds={'train': 800.0, 'evaluate': 200.0, 'total': 1010.0},
      training=report.Training(
          steps=120, tokens=61_440, tokens_per_second=76.8, start='gptq',
          trained={'scales': 1e-3, 'norms': 3e-4}, embedding_format='q8_0',
          config='gemma3_270m_cpu', git='0123abc',
      ),
      measured=report.Measurement(
          engine='llama.cpp 1.2 in process', context=512, text='topics',
          base='the Q4_K_M file dequantized',
          fidelities=measured or fidelities(),
      ),
      file_bytes={
          'base_bf16': 536_100_000, 'ptq': 241_200_000, 'qat': 241_300_000
      },
      jax=jax,
  )


def rows():
  """As a run writes them: not every row has every key."""
  found = [{'step': 0, 'heldout_kl_nats': 0.6}]
  for n in range(1, 121):
    row = {
        'step': n, 'tokens': 512.0 * n, 'kl_nats': 0.1 + 0.5 / n,
        'learning_rate': 1e-3 * (1 - n / 121), 'tokens_per_second': 80.0,
    }
    found.append(row | ({'heldout_kl_nats': 0.2} if n % 40 == 0 else {}))
  return found
