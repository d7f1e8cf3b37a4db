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
from jepax.models.positions import interpolate
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
    raise ValueError(
      f"images of {h}x{w} pixels do not divide into patches of {patch}; choose multiples of "
      f"{patch} for data.size (and sizes of views)"
    )
  return rearrange(images, "b (gh p) (gw q) c -> b (gh gw) (p q c)", p=patch, q=patch)


def unpatchify(patches: jax.Array, *, grid: tuple[int, int], patch: int) -> jax.Array:
  """Puts images together from their patches: the inverse of `patchify`.

  Args:
    patches: [b n patch*patch*c], raster order.
    grid: patches (rows, columns) of an image, n in all.
    patch: pixels a side.

  Returns:
    [b rows*patch columns*patch c].

  Raises:
    ValueError: another number of patches, or values that make no square of pixels.
  """
  chex.assert_rank(patches, 3)
  _, n, values = patches.shape
  if n != grid[0] * grid[1] or values % patch**2:
    raise ValueError(
      f"{n} patches of {values} values make no image of {grid[0]}x{grid[1]} patches with "
      f"{patch}x{patch} pixels: give {grid[0] * grid[1]} patches of {patch**2} values a channel"
    )
  return rearrange(patches, "b (gh gw) (p q c) -> b (gh p) (gw q) c", gh=grid[0], p=patch, q=patch)


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
  check_sincos(width)
  omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
  rows, columns = np.mgrid[: grid[0], : grid[1]].reshape(2, -1)
  angles = [position[:, None] * omega for position in (columns, rows)]
  return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1).astype(np.float32)


def check_sincos(width: int) -> None:
  """Raises ValueError where sin-cos positions can't have this width."""
  if width % 4:
    below = width // 4 * 4
    near = [n for n in (below, below + 4) if n]
    raise ValueError(
      f"width={width}: sin-cos positions need a width that is a multiple of 4; nearest: {near}"
    )


class ViT(Stack, kw_only=True):
  """Images to tokens: class token, then registers, then patches, as many of each as there are.

  patch: pixels a side.
  class_token: prepend a learned token (MAE, DINOv2).
  registers: learned tokens without position, after the class token (DINOv2).
  mask_token: a learned stand-in for hidden patches (DINOv2), see `hidden` below.
  position: 'sincos', the frozen table of any grid, zero for the class token; or 'learned', a
    table for `grid` and, where there is one, the class token.
  grid: patches (rows, columns) of a learned table.
  resize: what a learned table does on another grid: 'refuse', or interpolate, 'bicubic' (DINOv2)
    or 'antialias' (DINOv2 with registers).
  token_std: of the initial class token and registers.
  final_norm: norm the output; without it tokens leave as the last block made them, which with
    norms='post' they always do: there the one norm outside the blocks stands before them.
  The other fields are those of `Stack`; `vit` has sizes by name.
  """

  patch: int
  class_token: bool = False
  registers: int = 0
  mask_token: bool = False
  position: str = "sincos"
  grid: tuple[int, int] | None = None
  resize: str = "refuse"
  token_std: float = 0.02
  final_norm: bool = True

  def __post_init__(self):
    one_of(self.position, ("sincos", "learned"), where="position")
    one_of(self.resize, ("refuse", "bicubic", "antialias"), where="resize")
    if self.patch < 1 or self.registers < 0:
      raise ValueError(
        f"patch must be at least 1 and registers at least 0, found {self.patch}, {self.registers}"
      )
    if (self.position == "learned") != (self.grid is not None):
      raise ValueError(
        f"grid belongs to position='learned', found position={self.position!r}, grid={self.grid}"
      )
    super().__post_init__()
    if self.position == "sincos":
      check_sincos(self.width)

  @property
  def prefix(self) -> int:
    """Tokens before the patches in the output: class token and registers."""
    return int(self.class_token) + self.registers

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    tokens: TokenSet | None = None,
    *,
    hidden: jax.Array | None = None,
    last: int | None = None,
  ) -> jax.Array:
    """Encodes all patches or, when `tokens` is given, those alone.

    Args:
      images: f32[b h w c], normalised; any size that divides by the patch, except that a learned
        position table fixes the grid, unless `resize` says how to interpolate it.
      tokens: which patches to see, index [b k]; None for all. With index [b m k] every image is
        encoded m times, and b below stands for b*m, the m sets of an image side by side.
      hidden: bool[b n], patches to replace by the mask token, without `tokens`.
      last: return the outputs of the last `last` blocks, each through the final norm.

    Returns:
      f32[b p+k d] after the final norm, p = `prefix`, k = n without `tokens`; with `last`,
      f32[last b p+k d].

    Raises:
      ValueError: another grid than the learned table's.
    """
    patches = patchify(images, patch=self.patch)
    grid = (images.shape[1] // self.patch, images.shape[2] // self.patch)
    first, position = self._positions(grid)
    if tokens is None:
      valid = None
    else:  # gather pixels rather than embeddings: the projection then runs on kept patches only
      patches, position, valid = gather(patches, tokens), position[tokens.index], tokens.valid
      if valid.ndim == 3:
        patches, position, valid = (
          x.reshape(-1, *x.shape[2:]) for x in (patches, position, valid)
        )  # [b*m k ...]
    x = dense(self, self.width, name="embed")(patches).astype(jnp.float32)  # [b k d]
    if self.mask_token:
      token = self.param("mask_token", nn.initializers.zeros, (1, 1, self.width))
      x = x if hidden is None else jnp.where(hidden[..., None], token, x)
    x, valid = self._prepend(x + position, valid, first)
    if self.norms == "post":
      return transformer(self)(layer_norm(self, "embed_norm", jnp.float32)(x), valid, last=last)
    x = transformer(self)(x, valid, last=last)
    return layer_norm(self, "norm", jnp.float32)(x) if self.final_norm else x

  def _positions(self, grid):
    """Positions of the class token, [d] or 0, and of the patches, [n d]."""
    if self.position == "sincos":
      return 0.0, jnp.asarray(sincos2d(grid, self.width))
    if grid != self.grid and self.resize == "refuse":
      raise ValueError(
        f"this encoder has learned positions for a grid of {self.grid} patches and was given "
        f"{grid}; resize its images, or its table (field resize, jepax.convert.positions)"
      )
    rows = int(self.class_token) + self.grid[0] * self.grid[1]
    table = self.param("position", nn.initializers.truncated_normal(0.02), (rows, self.width))
    first, table = (table[0], table[1:]) if self.class_token else (0.0, table)
    antialias = self.resize == "antialias"
    return first, interpolate(table, old=self.grid, new=grid, antialias=antialias)

  def _prepend(self, x, valid, position):
    """Puts class token and registers before the patches."""
    before, init = [], nn.initializers.normal(self.token_std)
    if self.class_token:
      token = self.param("class_token", init, (1, 1, self.width))
      before.append(token + position)
    if self.registers:
      shape = (1, self.registers, self.width)
      before.append(self.param("registers", init, shape))
    if not before:
      return x, valid
    before = [jnp.broadcast_to(t, (x.shape[0], *t.shape[1:])) for t in before]
    if valid is not None:
      valid = jnp.pad(valid, ((0, 0), (self.prefix, 0)), constant_values=True)
    return jnp.concatenate([*before, x], 1), valid


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
