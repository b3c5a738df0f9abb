"""Sets what was measured of quality in one page, from what is stored.

  python experiments/quality.py

Reads experiments/results/gemma3_270m_cpu/report.json (of `make qat`),
comparison.md (of experiments/comparison.py), ablations/*/report.md (of
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


def ablation(folder: pathlib.Path) -> list[str]:
  """The question, as its config asks it, and the table of its answer."""
  module = importlib.import_module(
      f'experiments.configs.ablations.{folder.name}'
  )
  question, *rest = module.__doc__.strip().split('\n\n')
  said = (folder / 'report.md').read_text(encoding='utf-8')
  table = [line for line in said.splitlines() if line.startswith('|')]
  answer = next((p for p in rest if p.startswith('Answer')), '')
  return [
      f'### {question.removeprefix("Question: ")}', *filter(None, [answer]),
      '\n'.join(table),
      f'Config `experiments/configs/ablations/{folder.name}.py`; everything '
      f'measured: `ablations/{folder.name}/report.md`.',
  ]


if __name__ == '__main__':
  sys.path.insert(0, str(ROOT))
  main()
