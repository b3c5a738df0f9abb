"""Which command does `gemma-qat NAME ...` (or `python -m gemma_qat`) mean?"""

import importlib
import sys

from gemma_qat import errors

# Name -> what it does, one line; each is a module of `gemma_qat.commands`.
COMMANDS = {
    'run': 'train, export, evaluate and report: the main job',
    'train': 'train alone; goes on by itself where it was stopped',
    'export': 'write a trained checkpoint as GGUF, codes and scales as trained',
    'quantize': 'write a GGUF without training (PTQ, the baseline)',
    'evaluate': 'perplexity, KL divergence and top-1 agreement of models',
    'sample': 'generate text',
    'inspect': 'what is in a model file: sizes, formats, metadata',
}

# As of BSD's sysexits.h: temporary failure, the same command can go on.
STOPPED = 75


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns the exit code.

  2 is a mistake in what was given, said in one line; 75 a run that was stopped
  and can go on.
  """
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(_usage())
    return 0 if argv else 2
  name, *rest = argv
  if name not in COMMANDS:
    print(f'gemma-qat: there is no command {name!r}: choose one of '
          f'{", ".join(COMMANDS)}.', file=sys.stderr)
    return 2
  # Only now: --help and a typo should not wait for JAX.
  module = importlib.import_module(f'gemma_qat.commands.{name}')
  try:
    return module.main(rest) or 0
  except errors.UserError as error:
    print(f'gemma-qat {name}: {error}', file=sys.stderr)
    return 2
  except errors.Stopped as error:
    print(f'gemma-qat {name}: {error}', file=sys.stderr)
    return STOPPED
  except KeyboardInterrupt:
    print(f'gemma-qat {name}: stopped.', file=sys.stderr)
    return 130


def _usage():
  lines = [f'  {name:9} {text}' for name, text in COMMANDS.items()]
  return (
      'Usage: gemma-qat COMMAND ...\n\n' + '\n'.join(lines)
      + '\n\ngemma-qat COMMAND --help says more.'
  )


if __name__ == '__main__':
  sys.exit(main())
