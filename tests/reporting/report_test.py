"""Do the report's numbers follow from the measured ones, and reach the disk?"""

import json
import math

import pytest

from gemma_qat import errors
from gemma_qat.reporting import report
from tests.reporting import sample

_FILES = {'report.json', 'report.md', 'loss.png', 'fidelity.png'}
_KEYS = {
    'model', 'device', 'steps', 'tokens', 'seconds', 'engine', 'context',
    'chunks', 'text', 'ppl', 'kld', 'top1', 'recovered_ppl', 'recovered_kld',
    'bytes',
}


def test_recovered_shares_are_those_worked_out_by_hand():
  r = sample.make_report()
  # 1 - (15 - 14) / (22 - 14) and 1 - 0.15 / 0.6.
  assert r['recovered_ppl'] == 0.875
  assert r['recovered_kld'] == pytest.approx(0.75, abs=1e-12)
  assert r['notes'] == []


def test_report_holds_every_agreed_key_with_the_measured_values():
  r = sample.make_report()
  assert _KEYS <= r.keys()
  assert r['ppl'] == {'base': 14.0, 'ptq': 22.0, 'qat': 15.0}
  assert r['kld'] == {'ptq': 0.6, 'qat': 0.15}
  assert r['top1'] == {'ptq': 0.625, 'qat': 0.8125}
  assert r['seconds'] == 1010.0
  assert r['seconds_by_phase'] == {'train': 800.0, 'evaluate': 200.0}
  assert r['bytes']['base_bf16'] == 536_100_000
  assert r['bytes']['qat'] == 241_300_000
  assert (r['steps'], r['tokens'], r['chunks']) == (120, 61_440, 40)


@pytest.mark.parametrize('ptq', [14.0, 13.5])
def test_no_share_of_perplexity_is_claimed_where_ptq_lost_none(ptq):
  r = sample.make_report(sample.fidelities(ptq=ptq))
  assert r['recovered_ppl'] is None
  assert r['recovered_kld'] == pytest.approx(0.75)
  (note,) = r['notes']
  assert 'recovered_ppl is null' in note and f'{ptq:.4f}' in note


def test_no_share_of_kl_is_claimed_where_ptq_has_none():
  r = sample.make_report(sample.fidelities(kld_ptq=0.0))
  assert r['recovered_kld'] is None and r['recovered_ppl'] == 0.875
  assert 'recovered_kld is null' in r['notes'][0]


def test_perplexity_below_the_base_is_remarked_upon():
  r = sample.make_report(sample.fidelities(qat=13.0))
  assert r['recovered_ppl'] == 1.125
  assert 'better than its base' in r['notes'][0]


def test_models_measured_on_different_chunks_are_not_compared():
  mixed = sample.fidelities() | {'ptq': sample.fidelity(22.0, 0.5, chunks=39)}
  with pytest.raises(ValueError, match='different chunks'):
    sample.make_report(mixed)


def test_jax_figures_stand_beside_and_do_not_touch_llama_cpp_s():
  alone = sample.make_report()
  assert alone['jax'] is None
  jax = sample.fidelities(qat=18.0, chunks=8)
  both = sample.make_report(jax=jax)
  assert both['jax']['recovered_ppl'] == 0.5
  assert both['jax']['chunks'] == 8
  assert both | {'jax': None} == alone


def test_write_leaves_the_four_files_and_nothing_else(tmp_path):
  r = sample.make_report(jax=sample.fidelities(chunks=8))
  for _ in range(2):  # The second time over the files of the first.
    report.write(tmp_path, r, sample.rows())
    assert {p.name for p in tmp_path.iterdir()} == _FILES
  assert json.loads((tmp_path / 'report.json').read_text()) == r
  text = (tmp_path / 'report.md').read_text(encoding='utf-8')
  assert '(loss.png)' in text and '(fidelity.png)' in text


def test_a_number_that_json_cannot_hold_writes_nothing(tmp_path):
  r = sample.make_report()
  r['tokens_per_second'] = math.inf
  with pytest.raises(ValueError):
    report.write(tmp_path, r, sample.rows())
  assert not list(tmp_path.iterdir())


def test_a_missing_workdir_is_the_user_s_error(tmp_path):
  with pytest.raises(errors.UserError, match='could not be written'):
    report.write(tmp_path / 'none', sample.make_report(), sample.rows())
