"""Say how much memory a Gemma 3 needs, before anything is downloaded."""

import argparse
import json
import pathlib

from gemma_qat import errors
from gemma_qat.checkpoints import atomic
from gemma_qat.reporting import gpus
from gemma_qat.reporting import memory
from gemma_qat.reporting import memory_detail
from gemma_qat.reporting import memory_plot
from gemma_qat.reporting import memory_table
from gemma_qat.reporting import sheets
from gemma_qat.reporting import storage


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser('gemma-qat memory', description=__doc__)
  add = parser.add_argument
  add('--size', help=f'{", ".join(memory.SIZES)}; all by default')
  add('--format', help=f'{", ".join(storage.LAYOUTS)} (default: all; q4_0 with '
      '--size)')
  add('--embedding', help='type of the embedding, such as q8_0, q4_0, q6_k, '
      "f16, bf16 (default: the format's usual one)")
  add('--context', type=int, metavar='TOKENS',
      help=f'(default: {memory.CONTEXT})')
  add('--kv', default='f16',
      help=f'the KV cache: {", ".join(memory.KV_TYPES)} (default: f16)')
  add('--gpu', metavar='CARD', help='24GB, or a name such as "RTX 3090"')
  add('--ubatch', type=int, default=memory.UBATCH, metavar='TOKENS',
      help="llama.cpp's batch, which local layers keep beside their window "
      '(default: 512; 0 counts the bare window)')
  add('--reserve', type=float, metavar='GB',
      help='for compute buffers and the driver (default: float32 logits of a '
      'batch + 0.5)')
  add('--vision', action=argparse.BooleanOptionalAction, default=False,
      help='count the vision tower of 4b and larger')
  add('--plot', type=pathlib.Path, metavar='FILE.png')
  add('--markdown', type=pathlib.Path, metavar='FILE.md',
      help='write the tables there as well')
  add('--json', action='store_true', help='machine-readable')
  a = parser.parse_args(argv)
  if a.reserve is not None and not 0 <= a.reserve < float('inf'):
    raise errors.UserError(
        f'--reserve={a.reserve} is no number of GB: give one such as 1.'
    )
  use = memory.Use(
      context=a.context, kv=a.kv, ubatch=a.ubatch, vision=a.vision,
      reserve=None if a.reserve is None else round(a.reserve * 1e9),
  )
  card = gpus.parse(a.gpu) if a.gpu else None
  found = memory_table.estimates(a.size, a.format, a.embedding, use)
  some = (
      memory_table.overview(a.format, a.embedding, use, card)
      if a.size is None else memory_detail.detail(found[0], use, card)
  )
  if a.json:
    figures = [memory_detail.figures(f, use, card) for f in found]
    print(json.dumps(figures, indent=2))
  else:
    print(sheets.set_plain(some))
  if a.markdown:
    text = sheets.set_markdown(some, 'Memory of Gemma 3, counted')
    with atomic.whole_file(a.markdown) as path:
      path.write_text(text, encoding='utf-8')
  if a.plot:
    drawn = found if a.format or a.embedding or a.size else [
        f for f in found if (f.layout, f.embedding) in memory_plot.PLOTTED
    ]
    with atomic.whole_file(a.plot) as path:
      memory_plot.plot_memory(drawn, path, card)
  return 0
