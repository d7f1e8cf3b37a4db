"""ConvNeXt: a convolutional network with the transformer's block, and no batch statistics.

Source: arXiv 2201.03545; sizes and conventions of torchvision's models.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from jepax.models.activations import gelu
from jepax.models.norms import LayerNorm
from jepax.models.product import product
from jepax.models.resnet import check_size, check_stages
from jepax.names import one_of
from jepax.sharding import constrain

# name: width, blocks a stage
VARIANTS = {"convnext_tiny": (768, (3, 3, 9, 3))}
INIT = nn.initializers.normal(0.02)  # the reference's truncation at +-2 is absolute, so none


def patches(owner: nn.Module, width: int, side: int, *, name: str) -> nn.Conv:
  """Cuts the map into patches of `side` and projects each to `width` channels."""
  return nn.Conv(
    width, (side, side), strides=side, padding=0, dtype=owner.dtype, kernel_init=INIT, name=name
  )


class Block(nn.Module, kw_only=True):
  """x + scale * mlp(norm(7x7 depthwise convolution of x)).

  layer_scale: initial value of `scale`, a learned factor a channel. A branch of a sample is dropped
  at the rate `drop_rate` where an rng stream 'drop_path' is passed.
  """

  layer_scale: float
  drop_rate: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[b h w c] -> [b h w c]."""
    x = constrain(x)
    c = x.shape[-1]
    layers = dict(dtype=self.dtype, kernel_init=INIT)
    y = nn.Conv(c, (7, 7), padding=3, feature_group_count=c, name="conv", **layers)(x)
    y = LayerNorm(dtype=self.dtype, name="norm")(y)
    y = gelu(nn.Dense(4 * c, dot_general=product, name="fc1", **layers)(y))
    y = nn.Dense(c, dot_general=product, name="fc2", **layers)(y)
    y = y * self.param("scale", nn.initializers.constant(self.layer_scale), (c,))
    if self.has_rng("drop_path"):
      kept = 1 - self.drop_rate
      y = y * (jax.random.bernoulli(self.make_rng("drop_path"), kept, (len(y), 1, 1, 1)) / kept)
    return x + y.astype(x.dtype)


class ConvNeXt(nn.Module, kw_only=True):
  """Images to the cells of the last map, as tokens; a sample's feature is their mean.

  The norm that the reference puts after that mean belongs to its classifier.

  width: d, channels of the last map; each stage before has half of the next.
  depths: blocks of each stage. stem: pixels a side of the first patches, 4, or for small images 2
  or 1. layer_scale: see `Block`. drop_path: rate of the last block, growing linearly
  from 0 at the first. dtype: of convolutions, linear layers and norms' outputs; parameters and the
  residual stream are float32.

  Raises:
    ValueError: a stage without blocks, sizes below 1, or a width that the stages don't divide.
  """

  width: int
  depths: tuple[int, ...]
  stem: int = 4
  layer_scale: float = 1e-6
  drop_path: float = 0.0
  dtype: jnp.dtype = jnp.float32

  class_token = False
  prefix = 0
  position = "none"
  grid = None

  def __post_init__(self):
    check_stages(self.depths, width=self.width, shrink=2 ** (len(self.depths) - 1))
    if self.stem < 1:
      raise ValueError(f"stem={self.stem} must be at least 1")
    if not 0 <= self.drop_path < 1:
      raise ValueError(f"drop_path must lie in [0, 1), found {self.drop_path}")
    super().__post_init__()

  @property
  def patch(self) -> int:
    """Pixels a side that one cell of the last map stands for."""
    return self.stem * 2 ** (len(self.depths) - 1)

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Encodes images.

    Args:
      images: f32[b h w c], normalised; h and w are multiples of `patch`.

    Returns:
      f32[b n d], the n cells in raster order.

    Raises:
      ValueError: another size.
    """
    check_size(images, patch=self.patch)
    rates = iter(np.linspace(0, self.drop_path, sum(self.depths)).tolist())
    x = images
    for stage, depth in enumerate(self.depths):
      width = self.width >> (len(self.depths) - 1 - stage)
      if stage:
        x = LayerNorm(dtype=self.dtype, name=f"stage{stage}_norm")(x)
      x = patches(self, width, 2 if stage else self.stem, name=f"stage{stage}_down")(x)
      x = x.astype(jnp.float32)
      if not stage:
        x = LayerNorm(name="stage0_norm")(x)
      for i in range(depth):
        x = Block(
          layer_scale=self.layer_scale,
          drop_rate=next(rates),
          dtype=self.dtype,
          name=f"stage{stage}_block{i}",
        )(x)
    return rearrange(x, "b h w d -> b (h w) d")


def convnext(variant: str, **fields) -> ConvNeXt:
  """A ConvNeXt by the name of its size: convnext_tiny.

  Args:
    variant: a key of VARIANTS.
    **fields: any other field of `ConvNeXt`; sizes given here override the variant's.

  Raises:
    ValueError: an unknown variant.
  """
  one_of(variant, VARIANTS, where="variant")
  sizes = dict(zip(("width", "depths"), VARIANTS[variant], strict=True))
  return ConvNeXt(**{**sizes, **fields})
