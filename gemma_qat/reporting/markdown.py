"""How is a report said in words?"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma_qat.reporting import tables

_NAMES = {'base': 'base', 'ptq': 'PTQ Q4_0', 'qat': 'QAT Q4_0'}
_SIZES = {'base': 'base_bf16', 'ptq': 'ptq', 'qat': 'qat'}
_STARTS = {
    'reference': "the format's own rounding",
    'search': 'a search of every block, weighted by the activations',
    'gptq': 'GPTQ rounding (errors passed on to what is rounded later)',
}


def render_markdown(
    report: Mapping[str, Any], plots: Mapping[str, str]
) -> str:
  """Says a report in words, with its tables and plots.

  Args:
    report: from `report.make_report`.
    plots: 'loss' and 'fidelity' -> image file, relative to the text.
  """
  parts = [
      f'# {report["model"]}, trained for Q4_0',
      _summary(report),
      '## Result',
      f'Measured by {report["engine"]}. Sizes in MB (10^6 bytes); KLD is the '
      'KL divergence from the base in nats a token, top-1 how often the most '
      "likely token is the base's.",
      _fidelity_table(report, report['bytes']),
      _recovered(report),
      f'![Perplexity and KL divergence]({plots["fidelity"]})',
      '## How it was measured',
      _protocol(report),
      _jax(report),
      _activations(report.get('activations') or {}),
      _samples(report.get('samples', ())),
      '## Training',
      _training_table(report),
      f'![Training and held-out loss]({plots["loss"]})',
      '## Terms',
      'The numbers are of the checkpoint named here and of no other. Weights '
      'of Gemma, and models made from them, come under the Gemma Terms of Use: '
      'https://ai.google.dev/gemma/terms',
  ]
  return '\n\n'.join(part for part in parts if part) + '\n'


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1
) -> str:
  """Sets texts as a table; the first `left` columns are aligned to the left.
  """
  line = lambda cells: '| ' + ' | '.join(
      str(cell).replace('|', r'\|') for cell in cells
  ) + ' |'
  sides = left * ['---'] + (len(header) - left) * ['---:']
  rule = '|' + '|'.join(sides) + '|'
  return '\n'.join([line(header), rule, *map(line, rows)])


def _summary(report):
  return (
      f'{report["model"]} was prepared for the 4-bit format Q4_0 by '
      'quantization-aware training: a quantized student learned the next-token '
      'probabilities of the checkpoint it was made from (KL divergence over '
      f'the full vocabulary) on {report["tokens"]:,} tokens in '
      f'{report["steps"]:,} steps on {report["device"]}. The trained codes '
      'and scales were written to a GGUF file as they are. Below it is '
      'compared with the checkpoint itself (base) and with its plain '
      'post-training quantization (PTQ), on text that the training never saw.'
  )


def _fidelity_table(report, sizes=None):
  rows = []
  for key, name in _NAMES.items():
    figures = tables.figures(*(
        report[k].get(key)
        for k in ('ppl', 'ppl_stderr', 'kld', 'kld_q99', 'top1')
    ))
    size = () if sizes is None else (tables.megabytes(sizes[_SIZES[key]]),)
    rows.append((name, *size, *figures))
  columns = tables.COLUMNS if sizes is not None else tables.COLUMNS[1:]
  return table(('model', *columns), rows)


def _recovered(figures):
  shares = [
      'nothing was lost' if figures[key] is None
      else tables.percent(figures[key])
      for key in ('recovered_ppl', 'recovered_kld')
  ]
  return '\n\n'.join((
      f'Won back of what PTQ lost: in perplexity **{shares[0]}**, in KL '
      f'divergence **{shares[1]}**.',
      *(f'> {note}' for note in figures['notes']),
  ))


def _protocol(report):
  return (
      f'- Text: {report["text"]}, {report["chunks"]} chunks of '
      f'{report["context"]} tokens; the second half of each chunk is scored '
      f"({report['tokens_scored']:,} tokens), by llama-perplexity's protocol. "
      'The errors are standard errors over tokens.\n'
      f'- Base: {report["base"]}; its size is that in bfloat16.\n'
      '- PTQ: Q4_0 by the reference rounding rule of the format, no training, '
      'no calibration; the same tensors quantized and the same embedding '
      f'format ({report["embedding_format"]}) as in the trained file.\n'
      '- QAT: the trained file. Its training began with '
      f'{_STARTS.get(report["start"], report["start"])}.'
  )


def _jax(report):
  jax = report['jax']
  if jax is None:
    return ''
  which = 'the same chunks'
  if jax['chunks'] != report['chunks']:
    which = (
        f'the first {jax["chunks"]} of the {report["chunks"]} chunks (so the '
        "figures are not to be compared with llama.cpp's of all chunks)"
    )
  same = report['llama_cpp_on_jax_chunks']
  return '\n\n'.join((
      f'Beside it, the same models computed by JAX on {which}:',
      _fidelity_table(jax),
      _recovered(jax),
      *(() if same is None else (
          'and by llama.cpp on the very chunks that JAX read:',
          _fidelity_table(same),
      )),
  ))


def _activations(found):
  """What a runtime that computes in float16 has to expect."""
  if 'qat' not in found:
    return ''
  qat = found['qat']
  beyond = qat['beyond_float16']
  said = (
      'The largest number that a layer of the trained model computed on this '
      f'text is {qat["largest"]:,.0f} ({qat["at"]}); float16 ends at 65,504.'
  )
  if beyond:
    said += (
        f' {len(beyond)} places are beyond it, the first of them '
        f'{beyond[0]}: runtimes must compute activations in bfloat16 or '
        'float32, as llama.cpp does.'
    )
  return said


def _samples(samples):
  """What the models said, side by side; line breaks are shown as ⏎."""
  if not samples:
    return ''
  one_line = lambda text: ' ⏎ '.join(
      line.strip() for line in text.strip().splitlines() if line.strip()
  ) or '(nothing)'
  parts = [
      '## What they say',
      'The likeliest token each time, so that one that differs changes all '
      'that follow: differences here say less than the divergences above.',
  ]
  for sample in samples:
    parts.append(table(
        (f'“{one_line(sample["prompt"])}”', 'goes on'),
        [(_NAMES[k], one_line(sample[k])) for k in _NAMES if k in sample],
        left=2,
    ))
  return '\n\n'.join(parts)


def _training_table(report):
  seconds = ', '.join(
      f'{phase} {value:,.0f}'
      for phase, value in report['seconds_by_phase'].items()
  )
  total = f'{report["seconds"]:,.0f}'
  return table(('', ''), [
      ('steps', f'{report["steps"]:,}'),
      ('tokens', f'{report["tokens"]:,}'),
      ('seconds', f'{total} ({seconds})' if seconds else total),
      ('tokens/s in training', f'{report["tokens_per_second"]:,.0f}'),
      ('device', report['device']),
      ('trained (peak rate)', ', '.join(
          f'{group} ({rate:.2g})'
          for group, rate in report['trained'].items()
      ) or 'nothing'),
      ('config', report['config']),
      ('git', report['git']),
  ], left=2)
