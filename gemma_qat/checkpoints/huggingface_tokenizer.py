"""How does a tokenizer come out of a Hugging Face folder?"""

import dataclasses
import json
import pathlib
from typing import Any

from gemma_qat import errors
from gemma_qat.checkpoints import regular_files
from gemma_qat.data import tokenizer as tokenizers
from gemma_qat.data import vocabulary

_TEMPLATE = 'chat_template.jinja'
_SPACE = '\u2581'
# Tokens that a fine-tune may add; a damaged id must not fill the memory.
_MOST_ADDED = 2**16


def load(folder: pathlib.Path) -> tokenizers.Tokenizer | None:
  """Reads tokenizer.model, else tokenizer.json; None where neither is.

  The end token and the chat template come from tokenizer_config.json and its
  neighbours.

  Raises:
    UserError: a tokenizer that is not Gemma's kind, or damaged JSON.
  """
  settings = read_json(folder / 'tokenizer_config.json', {})
  template = _chat_template(folder, settings)
  if (folder / 'tokenizer.model').exists():
    data = regular_files.read_bytes(
        folder / 'tokenizer.model', regular_files.LARGEST_TOKENIZER
    )
    with errors.about(folder / 'tokenizer.model'):
      tokenizer = tokenizers.from_proto(data, template)
    # A fine-tune's own tokens stand beside it, not in it.
    tokenizer = _with_added(tokenizer, _added_tokens(folder, settings), folder)
  elif (folder / 'tokenizer.json').exists():
    path = folder / 'tokenizer.json'
    try:
      tokenizer = _from_json(read_json(path), path, template)
    except (
        AttributeError, KeyError, TypeError, ValueError, OverflowError
    ) as error:
      raise errors.UserError(
          f'{path} is not laid out as expected ({error!r}): put the '
          'tokenizer.model of the checkpoint beside it.'
      ) from error
  else:
    return None
  end = _end_id(folder, settings, tokenizer)
  with errors.about(folder):
    return dataclasses.replace(tokenizer, eos_id=end)


def read_json(path: pathlib.Path, default: Any = None) -> Any:
  """Reads a JSON object; `default`, if given, where there is no file.

  Raises:
    UserError: missing without a default, or not a JSON object.
  """
  if default is not None and not path.exists():
    return default
  return regular_files.read_json(path)


def write_json(path: pathlib.Path, contents: Any) -> None:
  """Writes JSON as Hugging Face does: indented, UTF-8."""
  text = json.dumps(contents, indent=2, ensure_ascii=False)
  path.write_text(text + '\n', encoding='utf-8')


def _chat_template(folder, settings):
  if (folder / _TEMPLATE).exists():
    # Copied as it is into what is made of the checkpoint.
    regular_files.check_own(folder, _TEMPLATE)
    return regular_files.read_text(
        folder / _TEMPLATE, regular_files.LARGEST_SMALL
    )
  beside = read_json(folder / 'chat_template.json', {})
  template = beside.get('chat_template', settings.get('chat_template'))
  return template if isinstance(template, str) else None


def _added_tokens(folder, settings) -> dict[int, dict[str, Any]]:
  """Gathers {id: {content, special}} from wherever it is said.

  Oldest first: added_tokens.json, tokenizer.json, `added_tokens_decoder`.
  """
  found = {}
  try:
    for content, i in read_json(folder / 'added_tokens.json', {}).items():
      found[int(i)] = {'content': content}
    fast = read_json(folder / 'tokenizer.json', {}).get('added_tokens') or []
    for token in fast:
      found[int(token['id'])] = token
    for i, token in (settings.get('added_tokens_decoder') or {}).items():
      found[int(i)] = token
    return {i: {'content': str(t['content']), 'special': t.get('special')}
            for i, t in found.items()}
  except (
      AttributeError, KeyError, TypeError, ValueError, OverflowError
  ) as error:
    raise errors.UserError(
        f'{folder} says its added tokens in an unknown form ({error!r}): '
        'fetch its tokenizer files again.'
    ) from error


def _with_added(tokenizer, added, folder):
  """Puts a fine-tune's tokens into the vocabulary that it started from.

  A token behind the end is appended; one with the id of an unused piece takes
  its place; one that is there already becomes CONTROL where it is special.
  """
  size = tokenizer.vocab_size
  if added and max(added) >= size + _MOST_ADDED or min(added, default=0) < 0:
    raise errors.UserError(
        f'{folder} adds a token with id {max(added):,} to a vocabulary of '
        f'{size:,}: its tokenizer files do not belong together.'
    )
  pieces, scores = list(tokenizer.pieces), tokenizer.scores.tolist()
  types = tokenizer.types.tolist()
  for i in range(size, max(added, default=-1) + 1):
    # An id that no file names; llama.cpp's converter calls it so, too.
    pieces.append(f'[PAD{i}]')
    scores.append(0.0)
    types.append(vocabulary.UNUSED)
  for i, token in added.items():
    content = token['content'].replace(_SPACE, ' ')
    is_new = pieces[i].replace(_SPACE, ' ') != content
    if token['special']:
      types[i] = vocabulary.CONTROL
    elif is_new:
      types[i] = vocabulary.USER_DEFINED
    if is_new:
      pieces[i] = content
  if (pieces, types) == (list(tokenizer.pieces), tokenizer.types.tolist()):
    return tokenizer
  ids = {f'{n}_id': getattr(tokenizer, f'{n}_id')
         for n in ('bos', 'eos', 'pad', 'unk')}
  with errors.about(folder):
    return tokenizers.from_pieces(
        pieces, scores, types, **ids, chat_template=tokenizer.chat_template
    )


def _end_id(folder, settings, tokenizer):
  """Finds the token that ends an answer."""
  ends = read_json(folder / 'config.json', {}).get('eos_token_id')
  turn = tokenizer.end_of_turn_id
  if turn is not None and isinstance(ends, list) and turn in ends:
    # Instruction-tuned models list both and name '<eos>' as their eos_token.
    return turn
  end = settings.get('eos_token')
  end = end.get('content') if isinstance(end, dict) else end
  if end in tokenizer.pieces:
    return tokenizer.pieces.index(end)
  return tokenizer.eos_id


def _from_json(contents, path, template):
  """Rebuilds the SentencePiece vocabulary that a tokenizer.json came from.

  Gemma's ids count in merge order, so a piece's score is minus its rank; the
  list of merges, which follows from that, is not needed.
  """
  model = contents.get('model', {})
  if model.get('type') != 'BPE' or not model.get('byte_fallback'):
    raise errors.UserError(
        f'{path} is not a BPE tokenizer with byte fallback: put the '
        'tokenizer.model of the checkpoint beside it.'
    )
  added = {t['content']: t for t in contents.get('added_tokens', [])}
  pieces = model['vocab'] | {content: t['id'] for content, t in added.items()}
  ordered = sorted(pieces, key=pieces.get)
  if [pieces[p] for p in ordered] != list(range(len(ordered))):
    raise errors.UserError(f'{path} has gaps in its ids.')
  ids = {f'{n}_id': pieces.get(f'<{n}>') for n in ('bos', 'eos', 'pad', 'unk')}
  if None in ids.values():
    raise errors.UserError(f'{path} lacks <bos>, <eos>, <pad> or <unk>.')
  types = [_type(piece, added) for piece in ordered]
  scores, rank = [], 0
  for kind in types:
    scores.append(-float(rank) if kind == vocabulary.NORMAL else 0.0)
    rank += kind == vocabulary.NORMAL
  # Through a proto, because that is where Gemma's piece types are set right.
  proto = vocabulary.make_proto(ordered, scores, types, ids)
  with errors.about(path):
    return tokenizers.from_proto(proto, template)


def _type(piece, added):
  if piece in added:
    is_special = added[piece].get('special')
    return vocabulary.CONTROL if is_special else vocabulary.USER_DEFINED
  is_byte = len(piece) == 6 and piece.startswith('<0x') and piece[5] == '>'
  return vocabulary.BYTE if is_byte else vocabulary.NORMAL
