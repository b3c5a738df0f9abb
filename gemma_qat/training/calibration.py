"""What do the inputs of each matrix look like on real text?"""

from typing import Any, Callable, Iterable, Mapping

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.model import layers
from gemma_qat.model import transformer


def gather_grams(
    model: transformer.Transformer,
    params: Mapping[str, Any],
    batches: Iterable[np.ndarray],
    on_batch: Callable[[int], None] = lambda tokens: None,
    head_only: bool = False,
) -> dict[str, np.ndarray]:
  """Reads text with the teacher and sums its activations' outer products.

  Args:
    model: the network.
    params: the teacher's tree.
    batches: int [B, L] tokens each.
    on_batch: called with the number of tokens of each batch.
    head_only: leaves out the matrices inside of layers.

  Returns:
    Tree path of a matrix -> float32 [C, C] mean outer product of its inputs,
    [G, C, C] for stacked layers.
  """
  @jax.jit
  def read(params, tokens):
    hidden, grams = model.apply(
        {'params': params}, tokens, mutable=[] if head_only else ['gram']
    )
    # What the head, which is the embedding, multiplies with.
    head = {'embedding': layers.gram(hidden, 1, model.dtype)}
    return head | grams.get('gram', {})

  total, tokens = None, 0
  for batch in batches:
    grams = read(params, batch)
    total = grams if total is None else jax.tree.map(jnp.add, total, grams)
    tokens += batch.size
    on_batch(batch.size)
  if total is None:
    raise ValueError('No batch to calibrate on.')
  mean = jax.tree.map(lambda x: np.asarray(x) / tokens, total)
  found = {}
  for path, gram in traverse_util.flatten_dict(mean, sep='/').items():
    layer, slash, name = path.rpartition('/')
    for reader in transformer.READERS.get(name, (name,)):
      found[f'{layer}{slash}{reader}'] = gram
  return found
