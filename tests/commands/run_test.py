"""The main job, small: what it leaves, and that the files agree."""

import json

import numpy as np
import pytest

from gemma_qat import __main__ as cli
from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.commands import evaluate
from gemma_qat.commands import run
from gemma_qat.commands import sample
from gemma_qat.training import metrics
from tests.commands import conftest


def test_the_workdir_holds_what_was_promised(finished):
  workdir, _, _ = finished
  for name in (
      'config.json', 'revision.json', 'metrics.jsonl', 'model-q4_0.gguf',
      'report.md', 'report.json', 'loss.png', 'fidelity.png',
  ):
    assert (workdir / name).stat().st_size, name
  assert list((workdir / 'events').iterdir())
  assert list((workdir / 'checkpoints').iterdir())


def test_the_report_has_the_agreed_keys(finished):
  workdir, report, config = finished
  stored = json.loads((workdir / 'report.json').read_text())
  for key in (
      'model', 'device', 'steps', 'tokens', 'seconds', 'engine', 'context',
      'chunks', 'text', 'recovered_ppl', 'recovered_kld',
  ):
    assert key in stored, key
  assert set(stored['ppl']) == {'base', 'ptq', 'qat'}
  assert set(stored['kld']) == set(stored['top1']) == {'ptq', 'qat'}
  assert {'base_bf16', 'qat'} <= set(stored['bytes'])
  assert stored['steps'] == config.train.steps
  assert stored['recovered_kld'] == pytest.approx(
      1 - stored['kld']['qat'] / stored['kld']['ptq']
  )
  assert report['ppl'] == stored['ppl']


def test_the_report_shows_what_the_models_say(finished):
  workdir, report, config = finished
  assert [s['prompt'] for s in report['samples']] == list(
      config.evaluation.prompts
  )
  assert all({'base', 'ptq', 'qat'} < set(s) for s in report['samples'])
  assert 'The capital of France is' in (workdir / 'report.md').read_text()


def test_training_brings_the_student_closer(finished):
  workdir, report, _ = finished
  heldout = [
      r['heldout_kl_nats'] for r in metrics.read(workdir)
      if 'heldout_kl_nats' in r
  ]
  assert heldout[-1] < heldout[0]
  assert report['kld']['qat'] < report['kld']['ptq']


def test_jax_and_llama_cpp_say_the_same(finished):
  _, report, _ = finished
  for name in ('base', 'ptq', 'qat'):
    assert report['jax']['ppl'][name] == pytest.approx(
        report['ppl'][name], rel=0.01
    )


def test_the_file_holds_the_trained_weights_bit_for_bit(finished):
  workdir, _, _ = finished
  trained = checkpoints.dequantized(detect.load(workdir))
  exported = checkpoints.dequantized(detect.load(workdir / run.QAT))
  for name, weight in trained.items():
    other = exported[name]
    if name.endswith('norm'):
      # The file holds the gain 1 + w, which is also all that the model uses.
      weight, other = np.float32(1) + weight, np.float32(1) + other
    np.testing.assert_array_equal(other, weight, err_msg=name)


def test_ptq_and_qat_quantize_the_same_tensors(finished):
  workdir, _, _ = finished
  types = lambda file: {
      n: e.type for n, e in detect.load(workdir / file).weights.entries.items()
  }
  assert types(run.PTQ) == types(run.QAT)
  assert types(run.QAT)['layer_0/attn_q'] == 'Q4_0'
  assert types(run.QAT)['embedding'] == 'Q8_0'


def test_a_finished_run_trains_no_further(finished):
  workdir, report, config = finished
  before = (workdir / metrics.FILE).read_bytes()
  again, _ = run.run(config, workdir)
  assert (workdir / metrics.FILE).read_bytes() == before
  assert again['ppl'] == report['ppl']


def test_export_repeats_the_file_of_the_run(finished, tmp_path, capsys):
  workdir, _, _ = finished
  to = tmp_path / 'again.gguf'
  assert cli.main(['export', f'--from={workdir}', f'--to={to}']) == 0
  assert to.read_bytes() == (workdir / run.QAT).read_bytes()
  assert 'bit for bit' in capsys.readouterr().out


@pytest.mark.parametrize('embedding', ['q4_0', 'f16'])
def test_export_changes_the_embedding_alone(finished, tmp_path, embedding):
  workdir, _, _ = finished
  to = tmp_path / 'other.gguf'
  assert cli.main([
      'export', f'--from={workdir}', f'--to={to}', f'--embedding={embedding}'
  ]) == 0
  old = detect.load(workdir / run.QAT).weights.entries
  new = detect.load(to).weights.entries
  changed = {n for n in old if old[n].type != new[n].type}
  assert changed == {'embedding'}


def test_quantize_writes_the_ptq_file_of_the_run(finished, tmp_path):
  workdir, _, config = finished
  to = tmp_path / 'ptq.gguf'
  assert cli.main([
      'quantize', f'--from={config.model.checkpoint}', f'--to={to}',
      '--format=q4_0',
  ]) == 0
  assert to.read_bytes() == (workdir / run.PTQ).read_bytes()


def test_evaluate_takes_every_layout_and_writes_json(finished, tmp_path):
  workdir, _, config = finished
  out = tmp_path / 'figures.json'
  file = workdir / run.QAT
  assert cli.main([
      'evaluate', str(workdir), str(file),
      f'--against={config.model.checkpoint}',
      f'--text={workdir / run.TEXT}', '--context=64', '--chunks=2',
      f'--json={out}',
  ]) == 0
  found = json.loads(out.read_text())['models']
  # The Orbax checkpoint and the file are one model.
  assert found[str(workdir)] == found[str(file)]
  assert found[str(file)]['kld'] > 0


def test_jax_reads_an_orbax_checkpoint_like_its_file(finished):
  workdir, _, _ = finished
  text = (workdir / run.TEXT).read_text()
  _, found = evaluate.evaluate(
      {'orbax': workdir, 'file': workdir / run.QAT}, text, 64, 1,
      against='orbax', engine='jax',
  )
  assert found['file'].kld == 0.0
  assert found['file'].ppl == found['orbax'].ppl


def test_sample_is_greedy_and_repeats(finished):
  workdir, _, _ = finished
  say = lambda **kw: ''.join(
      sample.sample(workdir / run.QAT, 'The ', max_tokens=6, **kw)
  )
  greedy = say()
  assert greedy == say()
  assert greedy != say(temperature=5.0, seed=1)


def test_inspect_shows_formats_and_metadata(finished, capsys):
  workdir, _, _ = finished
  assert cli.main(['inspect', str(workdir / run.QAT)]) == 0
  said = capsys.readouterr().out
  assert 'Q4_0' in said and 'bits per weight' in said
  assert 'num_layers = 1' in said


def test_damaged_seconds_are_refused_before_the_run_begins(finished, tmp_path):
  _, _, config = finished
  (tmp_path / run.SECONDS).write_text('{"train": ')
  with pytest.raises(errors.UserError, match='seconds.json cannot be read'):
    run.run(config, tmp_path)


def test_a_workdir_of_another_config_is_refused(finished, texts, capsys):
  workdir, _, config = finished
  assert cli.main([
      'run', f'--config={conftest.CONFIG}:tiny', f'--workdir={workdir}',
      *texts, f'--config.model.checkpoint={config.model.checkpoint}',
      '--config.optimizer.learning_rate=1.0',
  ]) == 2
  said = capsys.readouterr().err
  assert 'optimizer.learning_rate' in said and 'another config' in said


def test_a_finished_run_goes_to_every_layout(finished, tmp_path, capsys):
  workdir, _, _ = finished
  for layout in ('gguf', 'huggingface', 'mlx', 'orbax', 'gemma_cpp'):
    assert cli.main([
        'export', f'--from={workdir}', f'--to={tmp_path / layout}',
        f'--layout={layout}',
    ]) == 0
  assert capsys.readouterr().out.count('read back and equal') == 5
  left, right = detect.load(workdir), detect.load(tmp_path / 'gguf')
  assert left.config == right.config
  for name, weight in left.weights.items():
    if not name.endswith('norm'):
      np.testing.assert_array_equal(
          checkpoints.to_float32(weight),
          checkpoints.to_float32(right.weights[name]), err_msg=name,
      )
