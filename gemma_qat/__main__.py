"""Which command does `gemma-qat NAME ...` (or `python -m gemma_qat`) mean?"""

import importlib
import os
import sys

from gemma_qat import errors

# Name -> what it does, one line; each is a module of `gemma_qat.commands`, its
# hyphens underscores there.
COMMANDS = {
    'run': 'train, export, evaluate and report: the main job',
    'train': 'train alone; goes on by itself where it was stopped',
    'sweep': 'the same job at every point of a config, side by side',
    'reproduce': 'run a finished run again: does the same come out?',
    'report': 'set finished runs side by side: tables, plots, a page',
    'export': 'write a trained checkpoint for a runtime, numbers as trained',
    'convert': 'write any model in another layout',
    'quantize': 'write a GGUF without training (PTQ, the baseline)',
    'evaluate': 'perplexity, KL divergence and top-1 agreement of models',
    'sample': 'generate text',
    'generate-data': 'let a model write the text that its student trains on',
    'memory': 'what a size and format needs, before anything is downloaded',
    'plan': 'memory, traffic and time of a run on devices not at hand',
    'inspect': 'what is in a model file: sizes, formats, metadata',
}


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns the exit code.

  2 is a mistake in what was given, said in one line; 75 a run that was stopped
  and can go on.
  """
  if argv is None:
    argv = sys.argv[1:]
    if argv and argv[0] in ('run', 'train', 'sweep', 'reproduce'):
      _ask_for_huge_pages()
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(_usage())
    return 0 if argv else 2
  name, *rest = argv
  if name not in COMMANDS:
    print(f'gemma-qat: there is no command {name!r}: choose one of '
          f'{", ".join(COMMANDS)}.', file=sys.stderr)
    return 2
  # Only now: --help and a typo should not wait for JAX.
  module = importlib.import_module(
      f'gemma_qat.commands.{name.replace("-", "_")}'
  )
  try:
    return module.main(rest) or 0
  except errors.UserError as error:
    print(f'gemma-qat {name}: {error}', file=sys.stderr)
    return _left(2)
  except errors.Stopped as error:
    print(f'gemma-qat {name}: {error}', file=sys.stderr)
    return error.exit_code
  except BrokenPipeError:
    # `gemma-qat inspect ... | head`: nobody reads on, which is no mistake.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except KeyboardInterrupt:
    print(f'gemma-qat {name}: stopped.', file=sys.stderr)
    return 130


def _left(code):
  """Returns the code, or ends here what other processes do not know of."""
  hosts = sys.modules.get('gemma_qat.hosts')
  if hosts is not None and hosts.is_joined():
    hosts.abandon(code)
  return code


def _ask_for_huge_pages():
  """Starts anew with glibc's huge pages on, unless they were set either way.

  XLA's buffers on a CPU are allocated anew in every step; in pages of 4 KiB a
  third of a training step went into a million page faults. glibc reads the
  setting only when a process starts.
  """
  name = 'GLIBC_TUNABLES'
  if sys.platform == 'linux' and name not in os.environ:
    os.environ[name] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _usage():
  lines = [f'  {name:13} {text}' for name, text in COMMANDS.items()]
  return (
      'Usage: gemma-qat COMMAND ...\n\n' + '\n'.join(lines)
      + '\n\ngemma-qat COMMAND --help says more.'
  )


if __name__ == '__main__':
  sys.exit(main())
