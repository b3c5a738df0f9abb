"""Generate text with a model, by JAX, with a key/value cache."""

import argparse
import os
from typing import Iterator

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.commands import networks
from gemma_qat.model import sampling


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser('gemma-qat sample', description=__doc__)
  parser.add_argument('model', metavar='MODEL')
  parser.add_argument('--prompt', required=True)
  parser.add_argument('--max_tokens', type=int, default=64)
  parser.add_argument('--temperature', type=float, default=0.0,
                      help='0 takes the likeliest token (default)')
  parser.add_argument('--seed', type=int, default=0)
  a = parser.parse_args(argv)
  print(a.prompt, end='', flush=True)
  for piece in sample(
      a.model, a.prompt, a.max_tokens, a.temperature, a.seed
  ):
    print(piece, end='', flush=True)
  print()
  return 0


def sample(
    source: str | os.PathLike,
    prompt: str,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
  """Yields the continuation of a prompt, piece by piece."""
  if max_tokens < 1 or temperature < 0:
    raise errors.UserError(
        f'--max_tokens={max_tokens} and --temperature={temperature}: the '
        'first must be 1 or more, the second 0 or more.'
    )
  checkpoint = detect.load(source)
  tokenizer = checkpoints.tokenizer(checkpoint)
  model, params = networks.load(checkpoint)
  stop = {tokenizer.eos_id, tokenizer.end_of_turn_id}
  tokens, said = [], ''
  for token in sampling.generate(
      model, params, tokenizer.encode(prompt, bos=True), max_tokens, stop,
      temperature, seed,
  ):
    tokens.append(token)
    text = tokenizer.decode(tokens)
    # A character of several byte tokens shows once it is whole.
    if not text.endswith('\N{REPLACEMENT CHARACTER}'):
      yield text[len(said):]
      said = text
