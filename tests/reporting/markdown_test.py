"""Does the text say the very numbers of the report?"""

import re

from gemma_qat.reporting import markdown
from tests.reporting import sample

_PLOTS = {'loss': 'loss.png', 'fidelity': 'fidelity.png'}


def _table_rows(text):
  """First cell -> other cells, of the first row of that name."""
  found = {}
  for line in text.splitlines():
    if line.startswith('| '):
      name, *cells = (c.strip() for c in line.strip('|').split('|'))
      found.setdefault(name, cells)
  return found


def test_result_table_holds_the_numbers_of_the_report():
  r = sample.make_report()
  rows = _table_rows(markdown.render_markdown(r, _PLOTS))
  sizes = {'base': 'base_bf16', 'ptq': 'ptq', 'qat': 'qat'}
  for key, name in (('base', 'base'), ('ptq', 'PTQ Q4_0'), ('qat', 'QAT Q4_0')):
    size, ppl, kld, q99, top1 = rows[name]
    assert float(size) == r['bytes'][sizes[key]] / 1e6
    assert [float(x) for x in ppl.split('±')] == [
        r['ppl'][key], r['ppl_stderr'][key]
    ]
    if key == 'base':
      assert (kld, q99, top1) == ('-', '-', '-')
    else:
      assert float(kld) == r['kld'][key]
      assert float(q99) == r['kld_q99'][key]
      assert float(top1) == round(100 * r['top1'][key], 2)


def test_text_says_shares_engine_text_start_and_what_was_trained():
  text = markdown.render_markdown(sample.make_report(), _PLOTS)
  for phrase in (
      'perplexity **87.5 %**', 'divergence **75.0 %**',
      'Measured by llama.cpp 1.2 in process',
      'topics, 40 chunks of 512 tokens', '(10,200 tokens)',
      'the Q4_K_M file dequantized', 'same embedding format (q8_0)', 'GPTQ',
      '![Perplexity and KL divergence](fidelity.png)', 'Gemma Terms of Use',
  ):
    assert phrase in text, phrase
  rows = _table_rows(text)
  assert rows['tokens'] == ['61,440']
  assert rows['seconds'] == ['1,010 (train 800, evaluate 200)']
  assert rows['tokens/s in training'] == ['77']
  assert rows['trained (peak rate)'] == ['scales (0.001), norms (0.0003)']
  assert rows['git'] == ['0123abc']


def test_jax_stands_in_the_text_only_where_it_measured():
  assert 'JAX' not in markdown.render_markdown(sample.make_report(), _PLOTS)
  same = sample.make_report(jax=sample.fidelities(ptq=22.125))
  text = markdown.render_markdown(same, _PLOTS)
  assert 'by JAX on the same chunks' in text and '22.125' in text
  fewer = sample.make_report(jax=sample.fidelities(chunks=8))
  text = markdown.render_markdown(fewer, _PLOTS)
  assert 'the first 8 of the 40 chunks' in text


def test_a_share_that_does_not_exist_is_explained():
  r = sample.make_report(sample.fidelities(ptq=13.0))
  text = markdown.render_markdown(r, _PLOTS)
  assert 'perplexity **nothing was lost**' in text
  assert f'> {r["notes"][0]}' in text


def test_tables_stay_tables_when_a_name_holds_a_bar():
  r = sample.make_report()
  text = markdown.render_markdown(r | {'config': 'a|b'}, _PLOTS)
  (line,) = [l for l in text.splitlines() if l.startswith('| config')]
  assert len(re.findall(r'(?<!\\)\|', line)) == 3
