"""What is exported are the trained numbers; what is not trained is refused."""

import dataclasses

import gguf
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import export
from gemma_qat.checkpoints import layouts
from gemma_qat.checkpoints import random_weights
from gemma_qat.data import chat


@pytest.fixture(scope='module')
def trained(tiny, mixed):
  return dataclasses.replace(
      tiny, weights=checkpoints.from_arrays(mixed),
      vision=random_weights.load('random:tiny+vision').vision,
  )


@pytest.fixture(scope='module')
def wide():
  """A model with rows of 256, which K-quants need."""
  tiny = random_weights.load('random:tiny')
  config = dataclasses.replace(tiny.config, embed_dim=256)
  rng = np.random.default_rng(0)
  from_specs = {
      n: rng.standard_normal(s.shape).astype(np.float32)
      for n, s in export.model_weights.by_layer_specs(config).items()
  }
  return dataclasses.replace(
      tiny, config=config, weights=checkpoints.from_arrays(from_specs)
  )


def test_weights_off_any_lattice_are_refused(tiny, tmp_path):
  with pytest.raises(errors.UserError, match='0.0% of its blocks'):
    export.export(tiny, tmp_path / 'x.gguf')
  assert not list(tmp_path.iterdir())


def test_a_lattice_in_plain_numbers_is_exported_as_codes(trained, tmp_path):
  export.convert(
      trained, tmp_path / 'floats.gguf', layouts.Target(format='bf16')
  )
  found = export.export(
      detect.load(tmp_path / 'floats.gguf'), tmp_path / 'codes.gguf'
  )
  assert found.rounding.share == 1
  assert set(found.num_bytes) == {'Q4_0', 'Q8_0', 'F32'}


def test_every_piece_of_progress_is_told(trained, tmp_path):
  counts = []
  export.export(trained, tmp_path / 'x.gguf', on_weights=counts.append)
  assert sum(counts) == sum(
      int(np.prod(e.shape)) for e in trained.weights.entries.values()
  )


def test_the_embedding_alone_is_rounded_anew(trained, tmp_path):
  found = export.export(
      trained, tmp_path / 'x.gguf', layouts.Target(embedding='f16')
  )
  by_kind = found.changes.by_kind
  assert by_kind['embedding'].changed
  assert not by_kind['matrices'].changed and not by_kind['norms'].changed
  assert 'vision     bf16, exact' in found.notes
  names = sorted(p.name for p in tmp_path.iterdir())
  assert names == ['Modelfile', 'mmproj-x.gguf', 'x.gguf']


def test_q6_k_is_ggmls_own(wide, tmp_path):
  path = tmp_path / 'x.gguf'
  found = export.convert(
      wide, path, layouts.Target(format='q4_0', embedding='q6_k')
  )
  tensor = {t.name: t for t in gguf.GGUFReader(path).tensors}[
      'token_embd.weight'
  ]
  assert tensor.tensor_type == gguf.GGMLQuantizationType.Q6_K
  read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  error = np.sqrt(np.mean((read - wide.weights['embedding']) ** 2))
  assert 0.005 < error < 0.03
  assert found.changes.by_kind['embedding'].relative_rms == pytest.approx(
      error, rel=0.01
  )


def test_rows_that_k_quants_cannot_hold_are_refused(tiny, tmp_path):
  with pytest.raises(errors.UserError, match='rows of 64.*blocks of 256'):
    export.convert(
        tiny, tmp_path / 'x.gguf',
        layouts.Target(format='q4_0', embedding='q6_k'),
    )


def test_foreign_types_are_copied_byte_for_byte(wide, tmp_path):
  first, second = tmp_path / 'a' / 'x.gguf', tmp_path / 'b' / 'x.gguf'
  first.parent.mkdir()
  second.parent.mkdir()
  export.convert(wide, first, layouts.Target(format='q4_0', embedding='q6_k'))
  found = export.convert(detect.load(first), second, layouts.Target())
  assert found.changes.is_exact
  assert first.read_bytes() == second.read_bytes()


def test_lm_studios_folders(trained, tmp_path):
  found = export.export(
      trained, tmp_path / 'models', layouts.Target(publisher='me')
  )
  folder = tmp_path / 'models' / 'me' / 'gemma-3-tiny-GGUF'
  assert found.paths[0] == folder / 'gemma-3-tiny.gguf'
  assert found.paths[1].name.startswith('mmproj')
  assert all(p.is_file() for p in found.paths)


@pytest.mark.parametrize('name', ['../../evil', '/etc/passwd', '..', 'a/b'])
def test_no_name_leads_out_of_the_folder(trained, tmp_path, name):
  named = dataclasses.replace(
      trained, metadata={'general.name': name}, layout='gguf'
  )
  target = layouts.Target(publisher='me')
  for path in export.export(named, tmp_path / 'models', target).paths:
    assert path.resolve().is_relative_to(tmp_path / 'models' / 'me')
  with pytest.raises(errors.UserError, match='becomes a folder'):
    export.export(
        trained, tmp_path / 'models', layouts.Target(publisher=name)
    )


@pytest.mark.parametrize(('target', 'reason'), [
    (layouts.Target(layout='onnx'), "Unknown layout 'onnx'.*gguf"),
    (layouts.Target(format='int3'), "no format 'int3'.*q4_0"),
    (layouts.Target(embedding='q3_k'), "no embedding 'q3_k'.*q6_k"),
    (layouts.Target(mmproj='q8_0'), 'mmproj'),
    (layouts.Target(scales='int8'), 'scales'),
])
def test_what_a_layout_does_not_have_is_refused(trained, target, reason,
                                                tmp_path):
  with pytest.raises(errors.UserError, match=reason):
    export.convert(trained, tmp_path / 'x', target)


def test_a_template_whose_turns_are_no_tokens_is_refused(trained, tmp_path):
  tokenizer = dataclasses.replace(
      trained.tokenizer, chat_template=chat.TEMPLATE
  )
  speaking = dataclasses.replace(trained, tokenizer=tokenizer)
  export.export(speaking, tmp_path / 'whole.gguf')
  pieces = tuple(
      '<other>' if p == chat.TURN_ENDS else p for p in tokenizer.pieces
  )
  lost = dataclasses.replace(speaking, tokenizer=dataclasses.replace(
      tokenizer, pieces=pieces, end_of_turn_id=None
  ))
  with pytest.raises(errors.UserError, match='writes <end_of_turn>, but no'):
    export.export(lost, tmp_path / 'lost.gguf')
  assert not (tmp_path / 'lost.gguf').exists()
