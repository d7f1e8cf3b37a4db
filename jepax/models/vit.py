"""Vision transformer encoder that embeds only the patches it is asked for.

Source: arXiv 2010.11929; sizes and conventions of I-JEPA, arXiv 2301.08243.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from jepax.masks.tokens import TokenSet, gather
from jepax.models.transformer import Stack, dense, layer_norm, transformer
from jepax.names import one_of

# name: width, depth, heads, MLP width
VARIANTS = {
  "tiny": (192, 12, 3, 768),
  "small": (384, 12, 6, 1536),
  "base": (768, 12, 12, 3072),
  "large": (1024, 24, 16, 4096),
  "huge": (1280, 32, 16, 5120),
  "giant": (1408, 40, 16, 6144),
}


def patchify(images: jax.Array, *, patch: int) -> jax.Array:
  """Cuts images into patches, raster order, each flattened (row, column, channel).

  Args:
    images: [b h w c], h and w multiples of `patch`.
    patch: pixels a side.

  Returns:
    [b n patch*patch*c] with n = (h/patch)(w/patch).

  Raises:
    ValueError: a size that is not a multiple of the patch.
  """
  chex.assert_rank(images, 4)
  _, h, w, _ = images.shape
  if h % patch or w % patch:
    raise ValueError(f"images of {h}x{w} pixels do not divide into patches of {patch}")
  return rearrange(images, "b (gh p) (gw q) c -> b (gh gw) (p q c)", p=patch, q=patch)


@functools.cache
def sincos2d(grid: tuple[int, int], width: int) -> np.ndarray:
  """The frozen position table: [sin, cos] of the column, then [sin, cos] of the row.

  Args:
    grid: patches (rows, columns).
    width: d, a multiple of 4.

  Returns:
    f32[rows*columns, d], raster order.

  Raises:
    ValueError: a width that is not a multiple of 4.

  Source: MAE and I-JEPA; the half that the reference names for the height holds the column.
  """
  if width % 4:
    raise ValueError(f"sin-cos positions need a width that is a multiple of 4, found {width}")
  omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
  rows, columns = np.mgrid[: grid[0], : grid[1]].reshape(2, -1)
  angles = [position[:, None] * omega for position in (columns, rows)]
  return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1).astype(np.float32)


class ViT(Stack, kw_only=True):
  """Images to tokens. Takes any image size that divides by the patch.

  patch: pixels a side.
  class_token: prepend a learned token (MAE); it comes first in the output, without position.
  The other fields are those of `Stack`; `vit` has sizes by name.
  """

  patch: int
  class_token: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, tokens: TokenSet | None = None) -> jax.Array:
    """Encodes all patches or, when `tokens` is given, those alone.

    Args:
      images: f32[b h w c], normalised.
      tokens: which patches to see, index [b k]; None for all.

    Returns:
      f32[b k d] after the final norm, k = n without `tokens`; one more with a class token.
    """
    patches = patchify(images, patch=self.patch)
    grid = (images.shape[1] // self.patch, images.shape[2] // self.patch)
    position = jnp.asarray(sincos2d(grid, self.width))
    if tokens is None:
      valid = None
    else:  # gather pixels rather than embeddings: the projection then runs on kept patches only
      patches, position, valid = gather(patches, tokens), position[tokens.index], tokens.valid
    x = dense(self, self.width, name="embed")(patches).astype(jnp.float32) + position  # [b k d]
    if self.class_token:
      x, valid = self._prepend_class(x, valid)
    return layer_norm("norm", jnp.float32)(transformer(self)(x, valid))

  def _prepend_class(self, x, valid):
    token = self.param("class_token", nn.initializers.normal(0.02), (1, 1, self.width))
    x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], 1)
    if valid is not None:
      valid = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
    return x, valid


def vit(variant: str, *, patch: int, **fields) -> ViT:
  """A ViT by the name of its size: tiny, small, base, large, huge or giant.

  Args:
    variant: a key of VARIANTS.
    patch: pixels a side.
    **fields: any other field of `ViT`; sizes given here override the variant's.

  Raises:
    ValueError: an unknown variant.
  """
  one_of(variant, VARIANTS, where="variant")
  sizes = dict(zip(("width", "depth", "heads", "mlp_width"), VARIANTS[variant], strict=True))
  return ViT(patch=patch, **{**sizes, **fields})
