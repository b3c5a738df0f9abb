"""Do transformers read our folders, and what logits do they compute?

Run by a Python that has torch, transformers and, for int4 folders,
compressed-tensors and accelerate; nothing of gemma_qat is imported:

    python transformers_folder.py FOLDER --tokens tokens.npy --out logits.npy

FOLDER may be a GGUF file (which wants the package gguf too). tokens.npy:
int32 [L]; logits.npy: float32 [L, V].
"""

import argparse
import json
import pathlib

import numpy as np
import torch
import transformers


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--tokens', type=pathlib.Path)
  parser.add_argument('--out', type=pathlib.Path)
  parser.add_argument('--dtype', default='float32', help='or bfloat16, auto')
  parser.add_argument('--text', default='The  value\n\n  of <b>x</b>: \u00e9')
  arguments = parser.parse_args()
  folder, config, options = arguments.folder, {}, {}
  if folder.is_file():
    folder, options = folder.parent, {'gguf_file': folder.name}
    model_class = transformers.AutoModelForCausalLM
  else:
    config = json.loads((folder / 'config.json').read_text())
    model_class = getattr(transformers, config['architectures'][0])
  dtype = arguments.dtype
  model, info = model_class.from_pretrained(
      folder, output_loading_info=True, **options,
      dtype=dtype if dtype == 'auto' else getattr(torch, dtype),
  )
  print(f'{type(model).__name__}, {model.dtype}')
  for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
    print(f'{key}: {sorted(info[key])}')
  scales = {
      str(p.dtype) for n, p in model.state_dict().items()
      if n.endswith('weight_scale')
  }
  print(f'scales in memory: {sorted(scales)}')
  print_readers(folder, options, arguments.text, 'vision_config' in config)
  if arguments.tokens:
    tokens = torch.from_numpy(np.load(arguments.tokens).astype(np.int64))
    with torch.no_grad():
      logits = model(input_ids=tokens[None]).logits[0].float().numpy()
    print(f'logits {logits.shape}, from {logits.min():.3f} to '
          f'{logits.max():.3f}')
    if arguments.out:
      np.save(arguments.out, logits)


def print_readers(folder, options, text, with_images):
  """Says what tokenizer and processor make of a text."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
  print(f'{type(tokenizer).__name__}: {len(tokenizer)} tokens, '
        f'{tokenizer(text)["input_ids"]}')
  if with_images:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    print(f'{type(processor).__name__}, '
          f'{type(processor.image_processor).__name__}, '
          f'{processor.image_seq_length} soft tokens, size '
          f'{processor.image_processor.size}')


if __name__ == '__main__':
  main()
