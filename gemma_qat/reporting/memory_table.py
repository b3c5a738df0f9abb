"""How are memory figures said in tables?

GB are 10^9 bytes, as files are counted; cards have GiB, 2^30 bytes.
"""

from collections.abc import Callable, Sequence
import dataclasses

from gemma_qat import errors
from gemma_qat.model import config as model_config
from gemma_qat.reporting import gpus
from gemma_qat.reporting import memory
from gemma_qat.reporting import published
from gemma_qat.reporting import sheets
from gemma_qat.reporting import storage
from gemma_qat.reporting import tables
from gemma_qat.reporting import vision_tower

# (layout, embedding), largest first.
LINES = (
    ('bf16', 'bf16'), ('q8_0', 'q8_0'), ('sfp8', 'sfp8'), ('q4_0', 'f16'),
    ('mlx_f32', 'mlx8_f32'), ('mlx', 'mlx8'), ('w4a16', 'bf16'),
    ('q4_0', 'q8_0'), ('q4_0', 'q4_0'), ('int4', 'int4'),
)


def overview(
    layout: str | None = None,
    embedding: str | None = None,
    use: memory.Use = memory.Use(),
    card: gpus.Card | None = None,
) -> list[sheets.Sheet]:
  """All sizes: weights, what comes on top, where it fits, what is published.

  Raises:
    UserError: as `estimates`.
  """
  chosen = lines(layout, embedding)
  return [
      weights_table(chosen), beside_table(use),
      cards_table(chosen, use) if card is None
      else fits_table(chosen, use, card),
      explanation(),
  ]


def estimates(
    size: str | None = None,
    layout: str | None = None,
    embedding: str | None = None,
    use: memory.Use = memory.Use(),
) -> list[memory.Estimate]:
  """Estimates one model, or all sizes in all formats that are asked for.

  Args:
    size: a variant; its format is q4_0 unless given. None for all sizes that
      have the context and whose width fits the embedding.
    layout, embedding: as `storage.weights` takes them; None for all.
    use: how the models are run.

  Raises:
    UserError: something is unknown, or nothing is left.
  """
  if size is not None:
    config = model_config.variant(size)
    if use.vision and not vision_tower.has_vision(config):
      raise errors.UserError(
          f'{size} has no vision tower: leave out --vision.'
      )
    return [memory.estimate(config, layout or 'q4_0', embedding, use)]
  found = [
      memory.estimate(config, *line, use)
      for line in lines(layout, embedding) for config in _configs()
      if memory.has_context(config, use)
      and storage.has_whole_blocks(config, line[1])
  ]
  if not found:
    longest = max(c.context_length for c in _configs())
    raise errors.UserError(
        f'No size has a context of {use.context:,} tokens: give 1 to {longest}.'
    )
  return found


def lines(
    layout: str | None = None, embedding: str | None = None
) -> list[tuple[str, str]]:
  """The (layout, embedding) pairs that are asked for; LINES if nothing is.

  Raises:
    UserError: unknown, or no layout has such an embedding.
  """
  if layout is None and embedding is None:
    return list(LINES)
  if embedding is None:
    found = storage.layout(layout)
    return [x for x in LINES if x[0] == layout] or [
        (layout, found.embeddings[0])
    ]
  names = [n for n, _ in LINES] if layout is None else [layout]
  found = [
      (name, embedding) for name in dict.fromkeys(names)
      if embedding in storage.layout(name).embeddings
  ]
  if not found:
    known = {
        e for n in dict.fromkeys(names) for e in storage.layout(n).embeddings
    }
    raise errors.UserError(
        f'{layout or "No format"} holds {"no " if layout else "an "}'
        f'embedding in {embedding!r}: choose one of '
        f'{", ".join(sorted(known))}.'
    )
  return found


def weights_table(chosen: Sequence[tuple[str, str]]) -> sheets.Sheet:
  """Weights of every size, beside what was published of the same kind."""
  rows = []
  for layout, embedding in chosen:
    rows.append((layout, embedding, *(
        tables.gigabytes(storage.weights(config, layout, embedding).tensors)
        if storage.has_whole_blocks(config, embedding) else tables.ABSENT
        for config in _configs()
    )))
    rows += [
        _published(recipe) for recipe in published.RECIPES.values()
        if (recipe.layout, recipe.embedding) == (layout, embedding)
    ]
  notes = [
      f'{embedding} is not for a width that is no multiple of '
      f'{storage.TYPES[embedding].block}.'
      for _, embedding in chosen
      if not all(storage.has_whole_blocks(c, embedding) for c in _configs())
  ]
  return sheets.Sheet(
      'Weights of the text model in GB (10^9 bytes), and what was published '
      'of the same kind.',
      ('format', 'embedding', *memory.SIZES), rows,
      tuple(dict.fromkeys(notes)), left=2,
  )


def beside_table(use: memory.Use) -> sheets.Sheet:
  """What comes on top of the weights: cache, vision tower, reserve."""
  row = lambda name, values: (name, *map(tables.gigabytes, values))
  rows = [
      row(f'KV cache, {kv}', (
          _cache(c, dataclasses.replace(use, kv=kv)) for c in _configs()
      ))
      for kv in dict.fromkeys((use.kv, 'q8_0'))
  ]
  # Eight bits a number, nothing for scales: half of float16.
  ideal = (
      memory.kv_cache(c, published.KV_CONTEXT, 'f16', 0).total // 2
      for c in _configs()
  )
  name, _, *figures = _published(published.RECIPES['kv'])
  rows += [
      row('KV 32k, 8 bits, bare window', ideal),
      (name, *figures),
      row('vision tower (mmproj file)', map(
          vision_tower.mmproj_bytes, _configs()
      )),
      row('reserve', (_reserve(c, use) for c in _configs())),
  ]
  keep = (
      f'window + a batch of {use.ubatch} tokens, in multiples of 256, as '
      "llama.cpp's cache (--ubatch=0: the bare window)"
      if use.ubatch else 'window alone (--ubatch=512: as llama.cpp)'
  )
  return sheets.Sheet(
      f'On top, in GB. KV cache: one sequence of {_context(use):,} tokens.',
      ('', *memory.SIZES), rows, (
          f'Five of six layers are local and keep their {keep}.',
          'Reserve (--reserve): ' + (
              'as given.' if use.reserve is not None else
              'float32 logits of a batch, nearly all of the compute buffer '
              'that llama.cpp reports, and 0.5 GB assumed for driver and '
              'desktop.'
          ),
      ),
  )


def cards_table(
    chosen: Sequence[tuple[str, str]], use: memory.Use
) -> sheets.Sheet:
  """The smallest common card for every size and format."""
  def cell(found):
    gib = gpus.smallest(found.total)
    return f'> {gpus.COMMON[-1]}' if gib is None else str(gib)
  return sheets.Sheet(
      'Smallest card, in GiB, that holds ' + _what(use) + '.',
      ('format', 'embedding', *memory.SIZES),
      _grid(chosen, use, cell), left=2,
  )


def fits_table(
    chosen: Sequence[tuple[str, str]], use: memory.Use, card: gpus.Card
) -> sheets.Sheet:
  """The longest context with which every size and format fits a card."""
  def cell(found):
    longest = memory.longest_context(found, card.num_bytes, use)
    if found.total <= card.num_bytes:
      return tables.tokens(longest)
    return f'no ({tables.tokens(longest)})' if longest else 'no'
  return sheets.Sheet(
      f'What fits {card}: longest context in tokens. "no": not '
      + _what(use) + '; in brackets the context that does fit.',
      ('format', 'embedding', *memory.SIZES),
      _grid(chosen, use, cell), left=2,
  )


def explanation() -> sheets.Sheet:
  """Says what the published figures seem to count."""
  return sheets.Sheet(
      'What the published figures count: arithmetic that gives all of them '
      'to 0.06 GB or better. The report does not say how they were made.',
      (), [], tuple(
          f'{recipe.title}: {recipe.words}'
          for recipe in published.RECIPES.values()
      ),
  )


def _published(recipe):
  """A row of published figures, which know no 270M."""
  cells = (str(recipe.figures[s]) if s in recipe.figures else tables.ABSENT
           for s in memory.SIZES)
  return (f'  {recipe.title}', '', *cells)


def _grid(chosen, use, cell: Callable[[memory.Estimate], str]):
  """A row for every (layout, embedding), a cell for every size."""
  return [
      (*line, *(
          _cell(cell, config, *line, use) for config in _configs()
      ))
      for line in chosen
  ]


def _cell(cell, config, layout, embedding, use):
  if memory.has_context(config, use) and (
      storage.has_whole_blocks(config, embedding)
  ):
    return cell(memory.estimate(config, layout, embedding, use))
  return tables.ABSENT


def _configs():
  return [model_config.variant(size) for size in memory.SIZES]


def _cache(config, use):
  if not memory.has_context(config, use):
    return 0
  return memory.kv_cache(config, _context(use), use.kv, use.ubatch).total


def _reserve(config, use):
  if use.reserve is not None:
    return use.reserve
  return memory.reserve_bytes(config, use.ubatch)


def _context(use):
  return use.context or memory.CONTEXT


def _what(use):
  return (
      f'weights, {"vision tower, " if use.vision else ""}{_context(use):,} '
      f'tokens of {use.kv} KV cache and the reserve'
  )
