"""How is the memory of one model said, part by part?"""

import dataclasses
from typing import Any

from gemma_qat.reporting import gpus
from gemma_qat.reporting import memory
from gemma_qat.reporting import sheets
from gemma_qat.reporting import storage
from gemma_qat.reporting import tables
from gemma_qat.reporting import vision_tower


def detail(
    found: memory.Estimate,
    use: memory.Use = memory.Use(),
    card: gpus.Card | None = None,
) -> list[sheets.Sheet]:
  """The parts of one model, and the cards that hold it."""
  return [parts_table(found, use), cards_table(found, use, card)]


def figures(
    found: memory.Estimate,
    use: memory.Use = memory.Use(),
    card: gpus.Card | None = None,
) -> dict[str, Any]:
  """The same as plain values, for JSON; bytes everywhere."""
  fits = {} if card is None else {
      'gpu': card.name or None,
      'gpu_bytes': card.num_bytes,
      'fits': found.total <= card.num_bytes,
      'longest_context': memory.longest_context(found, card.num_bytes, use),
  }
  return {
      'size': found.config.variant,
      'format': found.layout,
      'embedding': found.embedding,
      'weights': dict(storage.weight_counts(found.config)),
      'weights_bytes': dataclasses.asdict(found.weights) | {
          'tensors': found.weights.tensors, 'file': found.weights.file,
      },
      'kv': use.kv,
      'kv_bytes': found.cache.total,
      'kv_tokens': {
          'local': found.cache.local_tokens, 'global': found.cache.global_tokens
      },
      'vision_bytes': found.vision,
      'reserve_bytes': found.reserve,
      'total_bytes': found.total,
      **fits,
  }


def parts_table(found: memory.Estimate, use: memory.Use) -> sheets.Sheet:
  """The parts of one model."""
  config, cache = found.config, found.cache
  layout = storage.layout(found.layout)
  counts = storage.weight_counts(config)
  num_global = sum(config.is_global(i) for i in range(config.num_layers))
  rows = [
      (f'matrices, {layout.matrices}', f'{counts["matrices"]:,} weights',
       tables.gigabytes(found.weights.matrices)),
      (f'embedding, {found.embedding}', f'{counts["embedding"]:,} weights',
       tables.gigabytes(found.weights.embedding)),
      (f'norms, {layout.norms}', f'{counts["norms"]:,} weights',
       tables.gigabytes(found.weights.norms)),
  ]
  if found.vision:
    rows.append((
        'vision tower and projector',
        f'{sum(vision_tower.weight_counts(config).values()):,} weights',
        tables.gigabytes(found.vision),
    ))
  rows += [
      (f'KV cache, {use.kv}, {num_global} global layers',
       f'{cache.global_tokens:,} tokens',
       tables.gigabytes(cache.global_bytes)),
      (f'KV cache, {use.kv}, {config.num_layers - num_global} local layers',
       f'{cache.local_tokens:,} tokens', tables.gigabytes(cache.local_bytes)),
      ('reserve', 'compute, driver', tables.gigabytes(found.reserve)),
      ('total', '', tables.gigabytes(found.total)),
  ]
  notes = []
  if found.weights.header:
    notes.append(
        f'File to download: {tables.gigabytes(found.weights.file)} GB, of '
        f'which {found.weights.header / 1e6:.1f} MB vocabulary, which stays on '
        'the host.'
    )
  if vision_tower.has_vision(config) and not found.vision:
    notes.append(
        'Without its vision tower, which takes '
        f'{tables.gigabytes(vision_tower.mmproj_bytes(config))} GB more '
        '(--vision).'
    )
  return sheets.Sheet(
      f'Gemma 3 {config.variant} in {found.layout}: {layout.where}.',
      ('part', 'of', 'GB'), rows, tuple(notes), left=2,
  )


def cards_table(
    found: memory.Estimate, use: memory.Use, card: gpus.Card | None
) -> sheets.Sheet:
  """Which cards hold one model, and how long its context can be."""
  cards = [card] if card else [
      gpus.Card('', gib * gpus.GIB) for gib in gpus.COMMON
  ]
  rows = []
  for one in cards:
    left = one.num_bytes - found.total
    longest = memory.longest_context(found, one.num_bytes, use)
    rows.append((
        str(one), 'fits' if left >= 0 else 'no',
        f'{left / 1e9:+.2f}',
        tables.tokens(longest) if longest else tables.ABSENT,
    ))
  return sheets.Sheet(
      'Where it fits, what is left, and the longest context that fits.',
      ('card', '', 'left, GB', 'context'), rows, left=2,
  )
