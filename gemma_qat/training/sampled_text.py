"""What does a sampled document begin with, and where does it end?"""

import dataclasses
import os
import sys

import numpy as np

from gemma_qat import errors
from gemma_qat.data import chat
from gemma_qat.data import sources
from gemma_qat.data import tokenizer as tokenizer_lib
from gemma_qat.model import batch_sampling


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the documents of a file depend on.

  Attributes:
    model: what `detect.load` takes.
    length: most tokens of a document, BOS and prompt among them.
    batch_size: sequences at once.
    temperature, top_k, top_p: see `model.drawing.draw`.
    seed: of the drawing.
    prompts: a source of texts that documents begin with, '' for none.
    chat: whether documents are a user's turn and the model's answer: the user
      says a prompt, or what the model makes up.
    dtype: of matrix products, 'auto' for the fast one.
  """

  model: str
  length: int = 512
  batch_size: int = 32
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  prompts: str = ''
  chat: bool = False
  dtype: str = 'auto'

  def __post_init__(self):
    for name, is_right, wanted in (
        ('length', self.length >= 2, '2 or more'),
        ('batch_size', self.batch_size >= 1, '1 or more'),
        ('temperature', 0 <= self.temperature < float('inf'), '0 or more'),
        ('top_k', self.top_k >= 0, '0 (all) or more'),
        ('top_p', 0 < self.top_p <= 1, 'above 0, at most 1'),
        ('seed', 0 <= self.seed < 2**32, '0 to 4294967295'),
    ):
      if not is_right:
        raise errors.UserError(
            f'--{name}={getattr(self, name)} must be {wanted}.'
        )


def prompts(
    s: Settings, tokenizer: tokenizer_lib.Tokenizer
) -> list[np.ndarray]:
  """Returns the tokens that documents begin with, each list led by BOS.

  A prompt of more than half of the length is cut.

  Raises:
    UserError: the prompts cannot be read, or leave no room.
  """
  if not s.prompts:
    opening = tokenizer.encode(
        chat.USER_BEGINS if s.chat else '', bos=True, specials=True
    )
    _check_room(s, len(opening) + 1)
    return [opening]
  source = s.prompts
  if os.path.isfile(source.split('#')[0]):
    source = f'jsonl:{source}'
  documents = sources.load(source, min_characters=1)
  if not all(d.is_plain for d in documents):
    raise errors.UserError(
        f'--prompts={s.prompts} holds conversations or sampled text: give '
        'plain text.'
    )
  make = _user_turn if s.chat else (lambda text: text)
  frame = tokenizer.encode(make(''), bos=True, specials=True)
  # A prompt leaves as much for the model as it takes itself.
  _check_room(s, len(frame) + 2)
  most = (s.length - len(frame)) // 2
  cut = []
  for document in documents:
    text = document.text.strip() if s.chat else document.text
    ids = tokenizer.encode(text)
    if len(ids) > most:
      text = tokenizer.decode(ids[:most])
    ids = tokenizer.encode(make(text), bos=True, specials=s.chat)
    cut.append(ids[: s.length - 1])
  return cut


def rules(
    s: Settings, tokenizer: tokenizer_lib.Tokenizer
) -> batch_sampling.Rules:
  """Returns how documents go on.

  Raises:
    UserError: a chat with a vocabulary that has no turns.
  """
  turn = tokenizer.end_of_turn_id
  makes_up = s.chat and not s.prompts
  if s.chat and turn is None:
    raise errors.UserError(
        f'{s.model} has no token {chat.TURN_ENDS}: leave --chat out.'
    )
  if s.chat and tokenizer.chat_template is None:
    print(f'{s.model} has no chat template: was it trained to speak in turns?',
          file=sys.stderr, flush=True)
  return batch_sampling.Rules(
      length=s.length,
      stop_ids=tuple({tokenizer.eos_id, turn} - {None}),
      # These stand between documents, and for no text.
      forbidden=(tokenizer.pad_id, tokenizer.bos_id, tokenizer.unk_id),
      vocabulary=tokenizer.vocab_size,
      turn_id=turn if makes_up else None,
      bridge=tuple(
          tokenizer.encode(chat.MODEL_BEGINS, specials=True).tolist()
      ) if makes_up else (),
      temperature=s.temperature, top_k=s.top_k, top_p=s.top_p,
  )


def trim(
    ids: np.ndarray, s: Settings, tokenizer: tokenizer_lib.Tokenizer
) -> np.ndarray:
  """Returns a sequence as training reads it: without BOS, and without the end.

  Between documents stands BOS, and nobody reads an EOS; but the end of a turn
  is read when a conversation goes on.
  """
  ids = ids[1:]
  turn = tokenizer.end_of_turn_id
  ends = {tokenizer.eos_id, turn} - ({turn} if s.chat else set())
  return ids[:-1] if len(ids) and int(ids[-1]) in ends else ids


def _check_room(s, fewest):
  if s.length < fewest:
    raise errors.UserError(
        f'--length={s.length} leaves the model no room: give {fewest} or more.'
    )


def _user_turn(text: str) -> str:
  return chat.USER_BEGINS + text + chat.TURN_ENDS + chat.MODEL_BEGINS
