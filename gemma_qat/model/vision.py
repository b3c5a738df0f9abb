"""What does the vision tower of the larger Gemma 3 consist of?

The tower (SigLIP) and its projector are carried through every conversion
unchanged; nothing here computes with them. Matrices are stored [outputs,
inputs] as in `weights`, but for the projector, which every public file holds
as [inputs, outputs].
"""

import dataclasses

from gemma_qat import errors
from gemma_qat.model import config
from gemma_qat.model import weights


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The sizes of a vision tower; the defaults are those of 4B, 12B and 27B.

  Attributes:
    image_size: pixels along each side of the (square) image.
    patch_size: pixels along each side of a patch.
    width, mlp_dim, num_layers, num_heads: of the tower.
    tokens_per_image: soft tokens an image becomes in the text.
    norm_epsilon: of the tower's layer norms.
    text_dim: width of the text model that the projector leads to.

  Invariants: `config.check_sizes` holds; image_size is a multiple of
  patch_size, width of num_heads.
  """

  text_dim: int
  image_size: int = 896
  patch_size: int = 14
  width: int = 1152
  mlp_dim: int = 4304
  num_layers: int = 27
  num_heads: int = 16
  tokens_per_image: int = 256
  norm_epsilon: float = 1e-6

  def __post_init__(self):
    config.check_sizes(self)
    if self.image_size % self.patch_size or self.width % self.num_heads:
      raise errors.UserError(
          f'A vision tower of {self.image_size} pixels in patches of '
          f'{self.patch_size} and width {self.width} with {self.num_heads} '
          'heads does not come out even: check its config.'
      )

  @property
  def num_positions(self) -> int:
    """Patches in an image."""
    return (self.image_size // self.patch_size) ** 2


def specs(c: VisionConfig) -> dict[str, weights.WeightSpec]:
  """Declares every weight of tower and projector, in file order.

  Names are flat, like `weights.by_layer_specs`: 'patches/kernel',
  'layer_3/attn_q/kernel', 'projector/kernel' ...
  """
  d, f = c.width, c.mlp_dim
  shapes = {
      'patches/kernel': (d, 3, c.patch_size, c.patch_size),
      'patches/bias': (d,),
      'positions': (c.num_positions, d),
  }
  for i in range(c.num_layers):
    for kind, shape in _layer(d, f).items():
      shapes[f'layer_{i}/{kind}'] = shape
  shapes |= {
      'post_norm/scale': (d,),
      'post_norm/bias': (d,),
      'projector/kernel': (d, c.text_dim),
      'projector/norm': (d,),
  }
  return {
      name: weights.WeightSpec(shape, (), 0) for name, shape in shapes.items()
  }


def _layer(d, f):
  shapes = {}
  for norm in ('norm_1', 'norm_2'):
    shapes |= {f'{norm}/scale': (d,), f'{norm}/bias': (d,)}
  for matrix in ('attn_q', 'attn_k', 'attn_v', 'attn_o'):
    shapes |= {f'{matrix}/kernel': (d, d), f'{matrix}/bias': (d,)}
  return shapes | {
      'mlp_up/kernel': (f, d), 'mlp_up/bias': (f,),
      'mlp_down/kernel': (d, f), 'mlp_down/bias': (d,),
  }
