"""Is the output of llama-perplexity read correctly, and its failure reported?

The outputs are written after the print statements of tools/perplexity of
llama.cpp b11549 (the columns, signs and spaces), with numbers made up.
"""

import stat

import gguf
import pytest

from gemma_qat import errors
from gemma_qat.evaluation import llama_cpp
from gemma_qat.evaluation import llama_engine
from gemma_qat.evaluation import llama_tool
from gemma_qat.evaluation import protocol
from tests.evaluation import tiny_gguf

PERPLEXITY = """\
0.00.512.113 I perplexity: tokenizing the input ..
0.00.620.427 I perplexity: tokenization took 108.314 ms
0.00.620.481 I perplexity: calculating perplexity over 4 chunks, n_ctx=512, \
batch_size=512, n_seq=1
0.05.130.002 I perplexity: 4.51 seconds per pass - ETA 0.30 minutes
[1]16.4410,[2]15.0731,[3]14.1179,[4]14.9528,
0.18.702.930 I Final estimate: PPL = 14.9528 +/- 1.38372

0.18.702.961 I llama_perf_context_print:        load time =     411.20 ms
"""

KL_DIVERGENCE = """\
0.00.620.481 I kl_divergence: computing over 4 chunks, n_ctx=512, \
batch_size=512, n_seq=1
0.05.130.002 I kl_divergence: 4.51 seconds per pass - ETA 0.30 minutes

chunk             PPL               ln(PPL(Q)/PPL(base))          \
KL Divergence              Δp RMS            Same top p
   1      25.4321 ±    5.1234       0.41234 ±    0.05123       \
0.35111 ±    0.02123    13.123 ±  0.812 %    68.235 ±  2.921 %
   4      22.6116 ±    2.2419       0.41506 ±    0.02511       \
0.34812 ±    0.01034    12.933 ±  0.402 %    69.118 ±  1.447 %

====== Perplexity statistics ======
Mean PPL(Q)                   :  22.611551 ±   2.241887
Mean PPL(base)                :  14.931325 ±   1.380388
Cor(ln(PPL(Q)), ln(PPL(base))):  96.57%
Mean ln(PPL(Q)/PPL(base))     :   0.415060 ±   0.025110
Mean PPL(Q)/PPL(base)         :   1.514370 ±   0.038031
Mean PPL(Q)-PPL(base)         :   7.680226 ±   0.981234

====== KL divergence statistics ======
Mean    KLD:   0.348120 ±   0.010340
Maximum KLD:   4.671234
99.9%   KLD:   3.931234
99.0%   KLD:   1.811234
95.0%   KLD:   1.012345
90.0%   KLD:   0.792345
Median  KLD:   0.232345
10.0%   KLD:   0.022345
 5.0%   KLD:   0.007345
 1.0%   KLD:   0.000445
 0.1%   KLD:  -0.000012
Minimum KLD:  -0.000034

====== Token probability statistics ======
Mean    Δp: -4.123 ± 0.391 %
Maximum Δp: 56.123%
99.0%   Δp: 27.123%
RMS Δp    : 12.933 ± 0.402 %
Same top p: 69.118 ± 1.447 %
"""

TOO_SHORT = """\
0.00.512.113 E perplexity: you need at least 1024 tokens to evaluate \
perplexity with a context of 512
0.00.512.120 E perplexity: the data file you provided tokenizes to only 81 \
tokens

0.00.512.131 I llama_perf_context_print:        load time =     411.20 ms
"""


def test_a_perplexity_is_read():
  assert llama_tool.parse_perplexity(PERPLEXITY) == protocol.Fidelity(
      ppl=14.9528, ppl_stderr=1.38372, tokens=4 * 255, chunks=4
  )


def test_a_divergence_is_read():
  read = llama_tool.parse_kl_divergence(KL_DIVERGENCE)
  assert read == protocol.Fidelity(
      ppl=22.611551,
      ppl_stderr=2.241887,
      tokens=4 * 255,
      chunks=4,
      kld=0.34812,
      kld_stderr=0.01034,
      kld_q99=1.811234,
      top1=pytest.approx(0.69118),
  )


@pytest.mark.parametrize(
    'parse', [llama_tool.parse_perplexity, llama_tool.parse_kl_divergence]
)
def test_an_output_without_a_result_is_reported_with_its_reason(parse):
  # The tool itself ends with code 0 here.
  with pytest.raises(errors.UserError, match='tokenizes to only 81 tokens'):
    parse(TOO_SHORT)


def test_a_failing_tool_is_reported_with_its_last_words(tmp_path):
  tool = _executable(
      tmp_path, 'echo "E llama_model_load: error loading model" >&2; exit 1'
  )
  with pytest.raises(errors.UserError, match='code 1 on m.gguf: .*loading mod'):
    llama_tool.evaluate_with_tool(tool, {'m': 'm.gguf'}, 'text.txt')


def test_a_missing_tool_is_reported(tmp_path):
  with pytest.raises(errors.UserError, match='nowhere cannot be run'):
    llama_tool.evaluate_with_tool(
        tmp_path / 'nowhere', {'m': 'm.gguf'}, 'text.txt'
    )


def test_the_base_is_run_first_and_its_file_reaches_the_others(tmp_path):
  # Replays the outputs above, and fails where the real tool would.
  (tmp_path / 'perplexity.txt').write_text(PERPLEXITY, encoding='utf-8')
  (tmp_path / 'kl.txt').write_text(KL_DIVERGENCE, encoding='utf-8')
  tool = _executable(
      tmp_path,
      f"""
      kl=no
      while [ $# -gt 0 ]; do
        case $1 in
          --kl-divergence) kl=yes ;;
          --kl-divergence-base) base=$2; shift ;;
        esac
        shift
      done
      if [ $kl = yes ]; then
        test -s "$base" && cat {tmp_path}/kl.txt
      else
        echo logits > "$base" && cat {tmp_path}/perplexity.txt
      fi
      """,
  )
  results = llama_tool.evaluate_with_tool(
      tool, {'q4': 'q4.gguf', 'f16': 'f16.gguf'}, 'text.txt', against='f16'
  )
  assert list(results) == ['q4', 'f16']
  assert results['q4'] == llama_tool.parse_kl_divergence(KL_DIVERGENCE)
  assert results['f16'] == llama_tool.parse_perplexity(PERPLEXITY)


@pytest.mark.skipif(
    llama_tool.find_tool() is None, reason='llama-perplexity is not installed'
)
def test_the_tool_agrees_with_the_engine_in_process(tmp_path):
  text = 'The cat sat on the mat, and the dog did not: 42 times.\n' * 20
  (tmp_path / 'text.txt').write_text(text)
  kinds = gguf.GGMLQuantizationType
  paths = {'f32': tmp_path / 'f32.gguf', 'q4': tmp_path / 'q4.gguf'}
  tiny_gguf.write(paths['f32'], matrix_type=kinds.F32)
  tiny_gguf.write(paths['q4'], matrix_type=kinds.Q4_0)
  with llama_cpp.LlamaCpp(paths['f32']) as model:
    tokens = model.tokenize(text, add_bos=True)
  ours = llama_engine.evaluate(paths, tokens, 64, 8, 'f32')
  theirs = llama_tool.evaluate_with_tool(
      llama_tool.find_tool(), paths, tmp_path / 'text.txt', 64, 8, 'f32'
  )
  for name in paths:
    assert theirs[name].ppl == pytest.approx(ours[name].ppl, rel=1e-2)
    assert theirs[name].tokens == ours[name].tokens
  assert theirs['q4'].kld == pytest.approx(ours['q4'].kld, rel=2e-2)


def _executable(folder, script):
  path = folder / 'tool.sh'
  path.write_text(f'#!/bin/sh\n{script}\n')
  path.chmod(path.stat().st_mode | stat.S_IXUSR)
  return path
