"""Question: what does every run of this project have to say about itself?

The complete config: every field that the program reads stands here, with the
values of an accelerator run of 5,000 steps. Other configs are this one and a
few changed lines. The variant behind the colon, `:tiny`, makes any of them run
in a minute on a CPU, with random weights.

  gemma-qat run --config=experiments/configs/base.py:tiny --workdir=runs/tiny
"""

import ml_collections

# (regex over tree paths, number format); the first that matches wins.
MATRICES_Q4_0 = (
    (r'(attn_[qkvo]|mlp_(gate|up|down))$', 'q4_0'),
    (r'^embedding$', 'q8_0'),
)


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.name = 'base'
  c.seed = 0

  c.model = ml_collections.ConfigDict()
  # A GGUF file, a Hugging Face folder, an Orbax checkpoint of ours,
  # 'gemma3-270m' (installed with pip) or 'random:VARIANT'.
  c.model.checkpoint = 'gemma3-270m'
  # Six layers are compiled once for all groups of six. False: every layer has
  # its own path (tail/layer_7/...), so that rules can tell layers apart, and
  # compiling takes several times as long.
  c.model.scan_layers = True

  c.quant = ml_collections.ConfigDict()
  c.quant.rules = MATRICES_Q4_0
  # What a quantized weight trains: see gemma_qat/quant/lattice.py.
  c.quant.modes = ((r'^embedding$', 'codes'), (r'.', 'learned'))
  c.quant.start = 'gptq'
  c.quant.calibration_tokens = 16_384
  # Q4_0 scales that bfloat16 holds too: exact in every runtime's file.
  c.quant.bf16_safe_scales = False

  # Scale channels by their activations first (as AWQ), where it folds away.
  c.quant.fold = False
  # With 'gptq': share of the earlier layers' loss that each makes up for.
  c.quant.error_propagation = 0.5
  # 'plain', 'clipped' or 'auto': what masters beyond the last code receive.
  c.quant.straight_through = 'auto'

  c.loss = ml_collections.ConfigDict()
  # (distance, weight): see gemma_qat/distances.py. Anything but the forward KL
  # alone, at temperature 1, takes more time and memory.
  c.loss.terms = (('forward_kl', 1.0),)
  c.loss.temperature = 1.0
  # Of the teacher's likeliest entries, the term 'top_k' sees so many.
  c.loss.top_k = 64

  c.train = ml_collections.ConfigDict()
  c.train.steps = 5_000
  c.train.batch_size = 16
  # Parts of a batch, one after the other: 4 takes a quarter of the memory for
  # activations and gives the same step.
  c.train.accumulate = 1
  c.train.length = 1_024
  # (regex over leaves, group); the groups' rates stand in `optimizer`.
  c.train.rules = (
      (r'^embedding', None),
      (r'/scale$', 'scales'),
      (r'norm$', 'norms'),
      (r'/master$', 'weights'),
  )
  # Share of the last steps in which no code changes any more.
  c.train.freeze_codes = 0.0
  c.train.checkpoint_every = 500
  c.train.evaluate_every = 100
  c.train.log_every = 10
  # Checkpoints that stay: the newest, those of the smallest held-out KL, and
  # that of every n-th step (0 for none).
  c.train.keep = 3
  c.train.keep_best = 1
  c.train.keep_every = 0
  c.train.heldout_batches = 4
  # Steps in a row whose loss or gradients are not finite, and which therefore
  # changed nothing, that end a run.
  c.train.most_skipped = 10
  # A batch of text that takes longer is complained of.
  c.train.stall_seconds = 60.0

  c.optimizer = ml_collections.ConfigDict()
  # 'adam' or 'adafactor'; Adam's moments as 'float32' (8 bytes a weight),
  # 'bfloat16' (4) or 'int8' (2.1).
  c.optimizer.name = 'adam'
  c.optimizer.moments = 'float32'
  c.optimizer.learning_rate = 1e-3
  # Group -> its rate in units of learning_rate. Rates of scales are relative:
  # 1e-3 moves a scale by up to 0.1 % a step.
  c.optimizer.multipliers = ml_collections.ConfigDict(
      {'scales': 1.0, 'norms': 0.3, 'weights': 0.01, 'factors': 0.3}
  )
  c.optimizer.warmup_steps = 100
  c.optimizer.clip = 1.0
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.95
  c.optimizer.epsilon = 1e-8
  # Decay of a running mean of what is trained, which the last step takes; 0 for
  # none.
  c.optimizer.average = 0.0
  # Draws masters to what they round to; 0 not at all.
  c.optimizer.dampening = 0.0

  c.compute = ml_collections.ConfigDict()
  c.compute.dtype = 'auto'
  c.compute.residual_dtype = 'float32'
  c.compute.remat = 'full'
  c.compute.attention = 'auto'
  c.compute.round_embedding_multiplier = False
  # Vocabulary entries at a time; 0 chooses from the shapes.
  c.compute.kl_block = 0

  c.data = ml_collections.ConfigDict()
  # See gemma_qat/data/readers.py for what can stand here.
  c.data.train = 'python_docs'
  c.data.heldout_fraction = 0.05

  c.mesh = ml_collections.ConfigDict()
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.tensor = 1
  # What fsdp sends around: 'weights', or the student's 'codes' and scales.
  c.mesh.gather = 'weights'

  c.evaluation = ml_collections.ConfigDict()
  c.evaluation.text = 'topics'
  c.evaluation.context = 512
  c.evaluation.chunks = 40
  # Chunks that JAX scores beside llama.cpp.
  c.evaluation.jax_chunks = 8
  # What base, PTQ and QAT continue in the report, so many tokens of each; in
  # turns where the checkpoint has a chat template.
  c.evaluation.prompts = (
      'The capital of France is',
      'def fibonacci(n):\n',
      'The three most important ideas of physics are',
      'Once upon a time, in a small town by the sea,',
  )
  c.evaluation.sample_tokens = 40
  return finish(c, variant)


def finish(
    c: ml_collections.ConfigDict, variant: str, devices=None
) -> ml_collections.ConfigDict:
  """Applies the variant behind the colon and locks the config.

  Args:
    c: the config.
    variant: what stands behind the colon, '' for nothing.
    devices: {variant: (data, fsdp, tensor, rows a device)} of a config that is
      meant for more than one device. Rows are per part of the batch, which
      lies over data * fsdp.
  """
  devices = devices or {}
  if variant in devices:
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor, rows = devices[variant]
    c.train.batch_size = rows * c.mesh.data * c.mesh.fsdp
  elif variant == 'tiny':
    c.model.checkpoint = 'random:tiny'
    c.quant.calibration_tokens = 256
    c.train.steps = 8
    c.train.batch_size = 8
    c.train.length = 64
    c.train.checkpoint_every = 4
    c.train.evaluate_every = 4
    c.train.log_every = 2
    c.train.heldout_batches = 1
    c.optimizer.warmup_steps = 2
    c.compute.dtype = 'float32'
    c.compute.remat = 'none'
    c.compute.kl_block = 128
    # Two blocks across its width: no part of it for eight devices.
    c.mesh.fsdp = c.mesh.tensor = 1
    c.evaluation.context = 64
    c.evaluation.chunks = 4
    c.evaluation.jax_chunks = 4
    c.evaluation.sample_tokens = 4
  elif variant:
    known = ', '.join(f':{name}' for name in ('tiny', *devices))
    raise ValueError(
        f'Unknown variant {variant!r} behind the colon: leave it out, or '
        f'write one of {known}.'
    )
  return c.lock()
