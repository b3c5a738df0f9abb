"""What does llama.cpp itself make of a GGUF file?

The real runtime in this process (see `llama_binding`): the file is loaded as
every user's llama.cpp loads it.
"""

from collections.abc import Sequence
import ctypes
import os
import pathlib

import numpy as np

from gemma_qat import errors
from gemma_qat.evaluation import llama_binding

# llama.cpp's own default: more tokens go through the layers in several passes.
_MAX_UBATCH = 512


class LlamaCpp:
  """One GGUF file, loaded by llama.cpp on the CPU.

  A context manager: leaving it frees the model. `tokenize`, `logits` and
  `generate` are independent of each other: none sees tokens of an earlier call.
  """

  def __init__(
      self,
      path: str | os.PathLike,
      context: int = 512,
      threads: int | None = None,
      full_window_cache: bool = False,
  ):
    """Loads a file.

    Args:
      path: a GGUF file.
      context: the most tokens a call may see.
      threads: of the computation; None takes every core this process may use
        (llama.cpp's default of 4 is slower where there are only 2).
      full_window_cache: keep every token in the caches of the sliding-window
        layers. The numbers are the same; it costs memory.

    Raises:
      UserError: not a GGUF file, or llama.cpp refuses it: with its reason.
    """
    self.path = pathlib.Path(path)
    self.context = context
    self._library = llama_binding.library()
    self._model = self._context = None
    _check_magic(self.path)
    self._library.forget()
    params = self._library.model_default_params()
    params.n_gpu_layers = 0
    self._model = self._library.model_load_from_file(
        os.fsencode(self.path), params
    )
    if not self._model:
      raise errors.UserError(
          f'llama.cpp cannot load {self.path}; download or export it again. '
          f'It says: {self._library.last_words()}'
      )
    self._vocab = self._library.model_get_vocab(self._model)
    self.vocab_size = self._library.vocab_n_tokens(self._vocab)
    self.bos_id = self._library.vocab_bos(self._vocab)
    self._open_context(threads or _num_cores(), full_window_cache)

  def __enter__(self) -> 'LlamaCpp':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Frees the model; the object cannot be used after that."""
    if self._context:
      self._library.free(self._context)
    if self._model:
      self._library.model_free(self._model)
    self._model = self._context = None

  def tokenize(self, text: str, add_bos: bool) -> np.ndarray:
    """Returns the int32 tokens [T] of a text; special tokens stay plain text.

    Raises:
      UserError: the text is too long for one call of llama.cpp (2 GiB).
    """
    encoded = text.encode('utf-8')
    # A token is a byte at least; BOS, EOS and a space in front come on top.
    room = len(encoded) + 3
    if room >= 2**31:
      raise errors.UserError(
          f'A text of {len(encoded)} bytes is too long for llama.cpp: cut it '
          'into pieces below 2 GiB.'
      )
    tokens = np.empty(room, np.int32)
    count = self._library.tokenize(
        self._vocab,
        encoded,
        len(encoded),
        _int32_pointer(tokens),
        room,
        add_bos,
        False,
    )
    if count < 0:
      raise RuntimeError(f'{-count} tokens in {room - 3} bytes of text.')
    return tokens[:count].copy()

  def text(self, tokens: Sequence[int]) -> str:
    """Returns the text of tokens, specials included, as llama.cpp prints it."""
    return b''.join(self._piece(int(t)) for t in tokens).decode(
        'utf-8', 'replace'
    )

  def logits(self, tokens: Sequence[int], first: int = 0) -> np.ndarray:
    """Returns the logits of the positions from `first` on.

    Only those rows go through the output head, which is most of the work of a
    small Gemma (V x D against 100 M weights in all layers).

    Args:
      tokens: integers [n], at most `context`; BOS is not added.
      first: the first position whose logits are wanted.

    Returns:
      float32 [n - first, V].

    Raises:
      UserError: too many tokens, or a token that the vocabulary does not have.
    """
    return self.logits_view(tokens, first).copy()

  def logits_view(self, tokens: Sequence[int], first: int = 0) -> np.ndarray:
    """As `logits`, without the copy: valid until the next call or `close`."""
    tokens = self._checked(tokens)
    if not 0 <= first < len(tokens):
      raise ValueError(f'first={first} is outside of {len(tokens)} tokens.')
    self._forget()
    return self._decode(tokens, 0, first)

  def generate(
      self,
      tokens: Sequence[int],
      max_tokens: int,
      temperature: float = 0.0,
      seed: int = 0,
  ) -> list[int]:
    """Continues a prompt until an end token or `max_tokens`.

    Args:
      tokens: the prompt [n], with its BOS.
      max_tokens: of the continuation; prompt and continuation must fit into
        `context`.
      temperature: 0 takes the likeliest token, else the logits are divided by
        it and sampled from, over the whole vocabulary.
      seed: of the sampling.

    Returns:
      The new tokens, without the end token.

    Raises:
      UserError: as `logits`.
    """
    prompt = self._checked(tokens)
    if len(prompt) + max_tokens > self.context:
      raise errors.UserError(
          f'{len(prompt)} tokens and {max_tokens} new ones do not fit into a '
          f'context of {self.context}: ask for fewer or open it larger.'
      )
    rng = np.random.default_rng(seed)
    self._forget()
    new, fed, position = [], prompt, 0
    while len(new) < max_tokens:
      row = self._decode(fed, position, len(fed) - 1)[0]
      position += len(fed)
      if temperature > 0:
        # The Gumbel trick: the argmax is a sample of the softmax.
        row = row / temperature + rng.gumbel(size=len(row))
      token = int(row.argmax())
      if self._library.vocab_is_eog(self._vocab, token):
        break
      new.append(token)
      fed = np.array([token], np.int32)
    return new

  def _open_context(self, threads, full_window_cache):
    params = self._library.context_default_params()
    params.n_ctx = params.n_batch = self.context
    params.n_ubatch = min(self.context, _MAX_UBATCH)
    params.n_threads = params.n_threads_batch = threads
    params.swa_full = full_window_cache
    self._library.forget()
    self._context = self._library.init_from_model(self._model, params)
    if not self._context:
      reason = self._library.last_words()
      self.close()
      raise errors.UserError(
          f'llama.cpp cannot open a context of {self.context} tokens on '
          f'{self.path}: {reason}'
      )
    # The second half of the check that the struct fits: what arrived there?
    for name in ('n_batch', 'n_ubatch', 'n_threads', 'n_threads_batch'):
      found = getattr(self._library, name)(self._context)
      if found != getattr(params, name):
        raise RuntimeError(f'llama.cpp read {name}={found}: struct misfit.')

  def _checked(self, tokens):
    tokens = np.ascontiguousarray(tokens, np.int32)
    if not 0 < len(tokens) <= self.context:
      raise errors.UserError(
          f'{len(tokens)} tokens do not fit into a context of {self.context}: '
          'pass at least one and no more than that.'
      )
    if tokens.min() < 0 or tokens.max() >= self.vocab_size:
      raise errors.UserError(
          f'{self.path} has {self.vocab_size} tokens: {tokens.min()} .. '
          f'{tokens.max()} is outside: tokenize the text for this model.'
      )
    return tokens

  def _forget(self):
    self._library.memory_clear(self._library.get_memory(self._context), True)

  def _decode(self, tokens, position, first):
    num = len(tokens)
    wanted = np.zeros(num, np.int8)
    wanted[first:] = 1
    positions = np.arange(position, position + num, dtype=np.int32)
    batch = llama_binding.Batch(
        n_tokens=num,
        token=_int32_pointer(tokens),
        pos=_int32_pointer(positions),
        logits=wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
    )
    self._library.forget()
    status = self._library.decode(self._context, batch)
    if status:
      raise errors.UserError(
          f'llama.cpp fails on {self.path} (status {status}): '
          f'{self._library.last_words()}'
      )
    return np.ctypeslib.as_array(
        self._library.get_logits(self._context), (num - first, self.vocab_size)
    )

  def _piece(self, token):
    room = 64
    while True:
      buffer = ctypes.create_string_buffer(room)
      used = self._library.token_to_piece(
          self._vocab, token, buffer, room, 0, True
      )
      if used >= 0:
        return buffer.raw[:used]
      room = -used


def _check_magic(path):
  if not path.is_file():
    raise errors.UserError(f'{path} is not a file: give the path of a GGUF.')
  with path.open('rb') as file:
    magic = file.read(4)
  if magic != b'GGUF':
    raise errors.UserError(
        f'{path} is not a GGUF file: it begins with {magic!r}, not GGUF.'
    )


def _int32_pointer(array):
  return array.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))


def _num_cores():
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
