"""Does every program that our files are written for read them, and how well?

    make consumers                                # installs them, runs all
    python experiments/consumers/check.py --only=mlx,gemma

Models go to --work and are made once; a stage that was interrupted starts
again where its models are. Each stage writes what the consumer printed to
experiments/results/consumers/<stage>.txt, and all stages that were ever run
together give experiments/results/consumers.md. With a model of one's own:

    ... --model=runs/mine/model-q4_0.gguf --bf16_safe=runs/safe/model-q4_0.gguf
"""

import argparse
import pathlib
import sys
import time

import folder_stages
import llama_stages
import other_stages
import session as sessions

STAGES = {
    'llama.cpp': llama_stages.llama_cpp,
    'llama-quantize': llama_stages.llama_quantize,
    'converter': llama_stages.converter,
    'mtmd': llama_stages.mtmd,
    'transformers': folder_stages.transformers,
    'vllm': folder_stages.vllm,
    'mlx': folder_stages.mlx,
    'gemma': folder_stages.gemma,
    'ollama': other_stages.ollama,
    'lm-studio': other_stages.lm_studio,
    'gemma.cpp': other_stages.gemma_cpp,
}
CONSUMERS = ('llama.cpp', 'transformers', 'mlx', 'gemma')
_HEAD = """\
# Do the programs that our files are written for read them?

Written by `make consumers` (experiments/consumers/check.py) on a 2-core CPU.
Figures are against our own logits or perplexity in JAX; what the programs
printed is in consumers/.

| consumer | layout | checked | figure | as it should be |
|---|---|---|---|---|
"""


def main() -> int:
  arguments = _parse()
  session = _session(arguments)
  results = arguments.results
  failed = False
  for name in arguments.only or STAGES:
    record, start = sessions.Record(session), time.monotonic()
    print(f'{name} ...', flush=True)
    try:
      STAGES[name](session, record)
    except sessions.NotInstalled as missing:
      print(f'{name}: left out, {missing}', file=sys.stderr)
      continue
    except RuntimeError as error:
      record.say(str(error))
      record.add(name, '-', 'the stage ends', '-', False)
    failed |= any(row.verdict == 'NO' for row in record.rows)
    record.write(results / 'consumers' / f'{name}.txt')
    _summarize(results)
    print(f'{name}: {time.monotonic() - start:.0f} s', flush=True)
  print(f'Summary: {results / "consumers.md"}')
  return int(failed)


def _summarize(results):
  files = [results / 'consumers' / f'{name}.txt' for name in STAGES]
  rows = [row for f in files if f.exists() for row in sessions.read_rows(f)]
  (results / 'consumers.md').write_text(
      _HEAD + ''.join('| ' + ' | '.join(row) + ' |\n' for row in rows),
      encoding='utf-8',
  )


def _parse():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--only', type=_stages,
                      help=f'some of {",".join(STAGES)}')
  parser.add_argument('--work', type=pathlib.Path,
                      default=pathlib.Path('runs/consumers'))
  parser.add_argument('--results', type=pathlib.Path,
                      default=sessions.ROOT / 'experiments' / 'results')
  parser.add_argument('--venvs', type=pathlib.Path,
                      default=pathlib.Path('.venv-consumers'),
                      help='folder of the environments '
                      + ', '.join(CONSUMERS))
  parser.add_argument('--venv', action='append', default=[],
                      metavar='CONSUMER=FOLDER', help='one that lies elsewhere')
  parser.add_argument('--llama_cpp', type=pathlib.Path, metavar='FOLDER',
                      help="llama.cpp's source (VENVS/llama.cpp-source)")
  parser.add_argument('--model', help='a Q4_0 GGUF to be checked; the '
                      'packaged 270M, rounded, by default')
  parser.add_argument('--bf16_safe', help='one that was trained with '
                      'config.quant.bf16_safe_scales')
  return parser.parse_args()


def _stages(text):
  names = text.split(',')
  if unknown := set(names) - STAGES.keys():
    raise argparse.ArgumentTypeError(
        f'no stage {", ".join(unknown)}: choose of {", ".join(STAGES)}'
    )
  return names


def _session(a):
  venvs = {name: a.venvs / name for name in CONSUMERS}
  for pair in a.venv:
    name, _, folder = pair.partition('=')
    if name not in venvs or not folder:
      raise SystemExit(f'--venv={pair}: give one of {", ".join(CONSUMERS)} '
                       'and its folder, as in mlx=/path.')
    venvs[name] = pathlib.Path(folder)
  return sessions.Session(
      work=a.work.resolve(),
      # Not resolved to the end: a link to Python is what makes it one.
      venvs={name: folder.absolute() for name, folder in venvs.items()},
      llama_cpp=(a.llama_cpp or a.venvs / 'llama.cpp-source').resolve(),
      model=a.model, bf16_safe=a.bf16_safe,
  )


if __name__ == '__main__':
  sys.exit(main())
