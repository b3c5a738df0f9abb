"""Show what is in a model: sizes, formats by tensor, bits per weight."""

import argparse
import json

from gemma_qat.checkpoints import description


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser('gemma-qat inspect', description=__doc__)
  parser.add_argument('model', metavar='MODEL')
  parser.add_argument('--json', action='store_true', help='machine-readable')
  arguments = parser.parse_args(argv)
  found = description.describe(arguments.model)
  if arguments.json:
    print(json.dumps(found, indent=2, default=str))
  else:
    print(render(found))
  return 0


def render(found: dict) -> str:
  """Lays out a description for reading."""
  lines = [
      f'{found["source"]}: {found["layout"]}, Gemma 3 {found["variant"]}',
      f'{found["weights"]:,} weights in {found["bytes"] / 1e6:,.1f} MB, '
      f'{found["bits_per_weight"]:.2f} bits per weight',
      '',
      f'{"type":8}{"tensors":>9}{"weights":>16}{"MB":>10}',
  ]
  for kind, t in found['tensors'].items():
    lines.append(
        f'{kind:8}{t["count"]:9}{t["weights"]:16,}{t["bytes"] / 1e6:10,.1f}'
    )
  lines += ['', 'by matrix:']
  for kind, types in found['matrices'].items():
    held = ', '.join(f'{n} x {t}' for t, n in types.items())
    lines.append(f'  {kind:14}{held}')
  lines += ['', 'model:']
  lines += [f'  {k} = {v}' for k, v in found['model'].items()]
  lines += ['', f'tokenizer: {found["tokenizer"] or "none"}']
  lines += [f'vision tower: {found["vision"] or "none"}', '', 'metadata:']
  lines += [f'  {k} = {v}' for k, v in found['metadata'].items()]
  return '\n'.join(lines)
