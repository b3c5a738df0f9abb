"""Let a model write the text that its student trains on."""

import argparse
import dataclasses
import pathlib

from gemma_qat import errors
from gemma_qat.training import generating
from gemma_qat.training import sampled_text


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
      'gemma-qat generate-data', description=__doc__
  )
  default = {
      f.name: f.default for f in dataclasses.fields(sampled_text.Settings)
  }
  add = lambda name, kind, text, **more: parser.add_argument(
      f'--{name}', type=kind, help=text, default=default.get(name), **more
  )
  parser.add_argument('model', metavar='MODEL')
  add('to', pathlib.Path, 'receives a JSON object a line; a stopped run goes '
      'on there', metavar='FILE.jsonl', required=True)
  add('tokens', _whole, 'so many tokens are enough (1e6)')
  add('documents', _whole, 'so many documents are; one a prompt by default')
  add('length', int, 'most tokens of a document (default: 512)')
  add('batch_size', int, 'documents at once (default: 32)')
  add('temperature', float, '0 takes the likeliest token (default: 1)')
  add('top_k', int, 'draw among the K likeliest tokens (default: 0, all)')
  add('top_p', float, 'draw among the likeliest that together have this '
      'probability (default: 1)')
  add('seed', int, 'of the drawing (default: 0)')
  add('prompts', str, 'what documents begin with: FILE.jsonl (its field text) '
      'or a source such as files:GLOB', metavar='SOURCE')
  add('dtype', str, 'of matrix products (default: the fast one here)',
      choices=('auto', 'bfloat16', 'float32'))
  parser.add_argument(
      '--chat', action='store_true',
      help="a user's turn and the model's answer; without --prompts the model "
      'makes up both',
  )
  a = parser.parse_args(argv)
  values = {name: getattr(a, name) for name in default}
  documents, tokens = generating.generate(
      sampled_text.Settings(**values), a.to, a.tokens, a.documents
  )
  print(
      f'{a.to}: {documents:,} documents, {tokens:,} tokens. To train on it:\n'
      f'  --config.data.train=jsonl:{a.to}'
  )
  return 0


def _whole(text: str) -> int:
  """Reads 1e6 as a million."""
  try:
    number = int(float(text))
  except (ValueError, OverflowError):
    number = 0
  if number < 1:
    raise errors.UserError(
        f'{text!r} is no number of tokens or documents: give 1 or more, such '
        'as 1e6.'
    )
  return number
