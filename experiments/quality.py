"""Sets what was measured of quality in one page, from what is stored.

  python experiments/quality.py

Reads experiments/results/gemma3_270m_cpu/report.json (of `make qat`),
gemma3_270m_h100/report.json, other_text.json (of `gemma-qat evaluate
--json`), comparison.md (of experiments/comparison.py), ablations/*/report.md (of
`gemma-qat report runs/X --to=experiments/results/ablations/X`) and the headings
of the lab log; writes experiments/results/quality.md and the table at the top
of README.md.
"""

import importlib
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'experiments' / 'results'


def main() -> None:
  from gemma_qat.reporting import headline  # After sys.path is set.
  report = json.loads((ROOT / headline.REPORT).read_text(encoding='utf-8'))
  parts = [
      '# Quality',
      'Made by `python experiments/quality.py` from the reports beside it. '
      'KL divergences are means in nats a token from the checkpoint that was '
      'not quantized; recovered shares are of what plain rounding (PTQ, by the '
      "format's reference rule, same tensors) lost.",
      '## The default run',
      headline.render(report),
      f'Seed {report.get("seed", 0)}, revision {report["git"][:12]}.',
      *on_a_gpu(),
      *other_text(),
  ]
  comparison = RESULTS / 'comparison.md'
  if comparison.exists():
    parts += [
        '## Beside what else there is', comparison.read_text(encoding='utf-8'),
        '![KL divergence against size](comparison.png)',
    ]
  folders = sorted(
      p.parent for p in (RESULTS / 'ablations').glob('*/report.md')
  )
  if folders:
    parts.append('## Questions, one at a time')
  for folder in folders:
    parts += ablation(folder)
  log = (ROOT / 'experiments' / 'README.md').read_text(encoding='utf-8')
  asked = [x[3:] for x in log.splitlines() if x.startswith('## ')]
  parts += [
      '## In the lab log', 'What was asked and measured there:',
      '\n'.join(f'- [{heading}](../README.md)' for heading in asked),
  ]
  text = '\n\n'.join(part.strip() for part in parts) + '\n'
  (RESULTS / 'quality.md').write_text(text, encoding='utf-8')
  headline.main()


def on_a_gpu() -> list[str]:
  """The run of experiments/configs/gemma3_270m.py, as far as it came."""
  from gemma_qat.reporting import headline
  folder = RESULTS / 'gemma3_270m_h100'
  report = json.loads((folder / 'report.json').read_text(encoding='utf-8'))
  planned = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
  return [
      '## On one GPU',
      _answer(importlib.import_module('experiments.configs.gemma3_270m')),
      f'{report["model"]}, Q4_0, {report["device"]}: {report["steps"]:,} of '
      f'{planned["train"]["steps"]:,} steps, {report["tokens"]:,} tokens, '
      f'{report["tokens_per_second"]:,.0f} tokens a second. '
      f'{report["chunks"]} chunks of {report["context"]} tokens of '
      f'{report["text"]}.',
      '\n'.join(headline.table(report)),
      'Curves and samples: `gemma3_270m_h100/report.md`; revision '
      f'{report["git"][:12]}.',
  ]


def other_text() -> list[str]:
  """The same files on text of another kind than what they were trained on."""
  said = json.loads((RESULTS / 'other_text.json').read_text(encoding='utf-8'))
  ptq = said['models']['PTQ Q4_0']['kld']
  commands = '\n'.join(f'    {line}' for line in said['commands'])
  rows = ['| model | PPL | KLD | KLD 99 % | top-1 % | KLD won back |',
          '|---|---:|---:|---:|---:|---:|']
  for name, m in said['models'].items():
    cells = [f'{m["ppl"]:.3f}', *4 * ['-']]
    if m['kld'] is not None:
      cells[1:] = [f'{m["kld"]:.4f}', f'{m["kld_q99"]:.4f}',
                   f'{100 * m["top1"]:.2f}',
                   f'{100 * (1 - m["kld"] / ptq):.1f} %']
    rows.append(f'| {name} | {" | ".join(cells)} |')
  return [
      '## On text of another kind', said['question'], '\n'.join(rows),
      f'{said["text"]}, by {said["engine"]}. Commands:\n\n{commands}',
  ]


def ablation(folder: pathlib.Path) -> list[str]:
  """The question, as its config asks it, and the table of its answer."""
  module = importlib.import_module(
      f'experiments.configs.ablations.{folder.name}'
  )
  question, *_ = module.__doc__.strip().split('\n\n')
  said = (folder / 'report.md').read_text(encoding='utf-8')
  table = [line for line in said.splitlines() if line.startswith('|')]
  return [
      f'### {question.removeprefix("Question: ")}',
      *filter(None, [_answer(module)]),
      '\n'.join(table),
      f'Config `experiments/configs/ablations/{folder.name}.py`; everything '
      f'measured: `ablations/{folder.name}/report.md`.',
  ]


def _answer(module) -> str:
  """The paragraph of a config's docstring that says what came out."""
  paragraphs = module.__doc__.strip().split('\n\n')
  return next((p for p in paragraphs if p.startswith('Answer')), '')


if __name__ == '__main__':
  sys.path.insert(0, str(ROOT))
  main()
