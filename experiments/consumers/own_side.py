"""Which models, tokens and logits of our own are the consumers' compared with?

Run by `session.Session.own` in a process of its own each time: what JAX held
is free again while a consumer runs.
"""

import argparse
import dataclasses
import pathlib

import jax
import numpy as np

from gemma_qat.checkpoints import checkpoint as checkpoints
from gemma_qat.checkpoints import detect
from gemma_qat.checkpoints import export
from gemma_qat.checkpoints import layouts
from gemma_qat.checkpoints import prepare
from gemma_qat.checkpoints import random_weights
from gemma_qat.commands import evaluate
from gemma_qat.commands import networks
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.model import config as model_config
from gemma_qat.model import vision as vision_config
from gemma_qat.model import weights as model_weights
from gemma_qat.quant import formats


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('command', choices=_COMMANDS)
  parser.add_argument('model', nargs='?')
  parser.add_argument('--to', type=pathlib.Path, required=True)
  parser.add_argument('--tokens', type=pathlib.Path)
  parser.add_argument('--count', type=int, default=48)
  parser.add_argument('--rounded', action='store_true',
                      help='sqrt(D) in bfloat16, as mlx-lm has it')
  arguments = parser.parse_args()
  _COMMANDS[arguments.command](arguments)


def _text(a):
  a.to.write_text(evaluate.read_text('topics'), encoding='utf-8')


def _tokens(a):
  """The first tokens of text that any model was given."""
  tokenizer = checkpoints.tokenizer(detect.load(a.model))
  text = evaluate.read_text('topics')[: 20 * a.count]
  np.save(a.to, tokenizer.encode(text, bos=True)[: a.count])


def _logits(a):
  network, params = networks.load(detect.load(a.model))
  network = network.clone(round_embedding_multiplier=a.rounded)
  tokens = np.load(a.tokens)[None]
  with jax.default_matmul_precision('highest'):
    hidden = network.apply({'params': params}, tokens)[0]
    np.save(a.to, np.asarray(hidden @ params['embedding'].T))


def _wide(a):
  """Widths of the 4B and of its tower, two layers each, a small vocabulary."""
  config = dataclasses.replace(
      model_config.variant('4b'), variant='custom', num_layers=2,
      vocab_size=512,
  )
  tower = vision_config.VisionConfig(text_dim=config.embed_dim, num_layers=2)
  checkpoint = random_weights.make(
      config, tower, tokenizers.tiny_tokenizer(config.vocab_size)
  )
  export.convert(
      checkpoint, a.to, layouts.Target('huggingface', 'bf16')
  )


def _bf16_safe(a):
  """A Q4_0 file as training with bf16-safe scales starts: by that rule."""
  checkpoint = detect.load(a.model)
  specs = model_weights.by_layer_specs(checkpoint.config)
  fmt = formats.bf16_safe(formats.get('q4_0'))
  weights = dict(checkpoint.weights)
  for name in prepare.matrices(checkpoint):
    weights[name] = ('q4_0', fmt.quantize(
        checkpoints.to_float32(weights[name]), specs[name].contraction
    ))
  rounded = dataclasses.replace(
      checkpoint, weights=checkpoints.from_arrays(weights)
  )
  export.convert(rounded, a.to, layouts.Target('gguf', embedding='q8_0'))


_COMMANDS = {
    'text': _text, 'tokens': _tokens, 'logits': _logits, 'wide': _wide,
    'bf16_safe': _bf16_safe,
}

if __name__ == '__main__':
  main()
