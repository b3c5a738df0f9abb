"""How does a stored report become the table at the top of the README?

  python -m gemma_qat.reporting.headline
"""

import json
import pathlib
import re
from typing import Any, Mapping

REPORT = 'experiments/results/gemma3_270m_cpu/report.json'
_MARKS = re.compile(r'(<!-- result -->\n).*?(\n<!-- /result -->)', re.DOTALL)


def render(report: Mapping[str, Any]) -> str:
  """Sets the headline figures of a report as Markdown."""
  lines = [
      f'{report["model"]}, Q4_0, on a {report["device"]}: {report["steps"]} '
      f'steps, {report["tokens"]:,} tokens, '
      f'{report["seconds"] / 60:.0f} minutes in all, evaluation included.',
      '',
      *table(report),
      f'Measured by {report["engine"]} on {report["chunks"]} chunks of '
      f'{report["context"]} tokens of {report["text"]} (CPython\'s '
      'documentation topics), which the training never saw. '
      f'Command: `make qat`; numbers: `{REPORT}`.',
  ]
  return '\n'.join(lines)


def table(report: Mapping[str, Any]) -> list[str]:
  """Lines of Markdown: the three models, and what was won back."""
  ppl, kld, top1 = report['ppl'], report['kld'], report['top1']
  size = lambda n: f'{n / 1e6:.0f} MB'
  percent = lambda x: f'{100 * x:.1f} %'
  return [
      '| model | size | perplexity | KL divergence | top-1 agreement |',
      '|---|---:|---:|---:|---:|',
      f'| base, bfloat16 | {size(report["bytes"]["base_bf16"])} '
      f'| {ppl["base"]:.3f} | - | - |',
      f'| PTQ Q4_0 | {size(report["bytes"]["ptq"])} | {ppl["ptq"]:.3f} '
      f'| {kld["ptq"]:.4f} | {percent(top1["ptq"])} |',
      f'| **QAT Q4_0** | {size(report["bytes"]["qat"])} '
      f'| **{ppl["qat"]:.3f}** | **{kld["qat"]:.4f}** '
      f'| **{percent(top1["qat"])}** |',
      '',
      f'Won back of what PTQ lost: **{percent(report["recovered_ppl"])}** of '
      f'the perplexity, **{percent(report["recovered_kld"])}** of the KL '
      'divergence.',
  ]


def main() -> None:
  """Writes the table of the stored report into README.md."""
  report = json.loads(pathlib.Path(REPORT).read_text(encoding='utf-8'))
  readme = pathlib.Path('README.md')
  text = readme.read_text(encoding='utf-8')
  table = render(report)
  text = _MARKS.sub(lambda m: m[1] + table + m[2], text)
  readme.write_text(text, encoding='utf-8')


if __name__ == '__main__':
  main()
