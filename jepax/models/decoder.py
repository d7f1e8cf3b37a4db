"""Decoders: MAE's transformer back to pixels, data2vec 2.0's convolutions back to features.

Source: arXiv 2111.06377 and 2212.07525.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from jepax import losses
from jepax.masks.tokens import TokenSet
from jepax.models.activations import gelu
from jepax.models.transformer import INITS, Stack, dense, layer_norm, transformer
from jepax.models.vit import check_sincos, sincos2d
from jepax.names import one_of
from jepax.sharding import platform


class PixelDecoder(Stack, kw_only=True):
  """A narrow transformer over visible and mask tokens.

  out: values a patch. The other fields are those of `Stack`.
  """

  out: int
  init_name: str = "xavier"

  def __post_init__(self):
    super().__post_init__()
    check_sincos(self.width)

  @nn.compact
  def __call__(
    self, x: jax.Array, visible: TokenSet, hidden: TokenSet, *, grid: tuple[int, int]
  ) -> jax.Array:
    """Predicts the pixels of the hidden patches.

    Attention does not care for order, so the mask tokens follow the visible ones, each with its
    position; nothing is shuffled back.

    Args:
      x: f32[b 1+k d], class token first.
      visible: positions of the k others, index [b k].
      hidden: positions to predict, index [b t].
      grid: patches (rows, columns) of the image.

    Returns:
      f32[b t out].
    """
    chex.assert_rank([visible.index, hidden.index], 2)
    b, t = hidden.index.shape
    position = jnp.asarray(sincos2d(grid, self.width))
    x = dense(self, self.width, name="embed")(x).astype(jnp.float32)
    x = x.at[:, 1:].add(position[visible.index])
    token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
    x = jnp.concatenate([x, token + position[hidden.index]], axis=1)  # [b 1+k+t w]
    valid = jnp.concatenate([jnp.ones((b, 1), bool), visible.valid, hidden.valid], axis=1)
    x = layer_norm(self, "norm", self.dtype)(transformer(self)(x, valid, keep=t))
    return dense(self, self.out, name="proj")(x).astype(jnp.float32)


def grouped_conv(
  x: jax.Array, kernel: jax.Array, *arguments: Any, feature_group_count: int, **options: Any
) -> jax.Array:
  """What `jax.lax.conv_general_dilated` is with stride 1 and padding 'SAME'.

  A CPU gets one product a group with the shifted images side by side: XLA's own form of grouped
  convolutions takes ten times as long there.

  Args:
    x: [b h w c].
    kernel: [k k c/groups d], k odd.
    *arguments: as of `conv_general_dilated`, and so `**options`.
    feature_group_count: groups.

  Returns:
    [b h w d].
  """
  groups = feature_group_count
  if platform() != "cpu":
    options["feature_group_count"] = groups
    return jax.lax.conv_general_dilated(x, kernel, *arguments, **options)
  (b, h, w, _), side = x.shape, kernel.shape[0]
  edge = side // 2
  x = jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
  shifted = [x[:, i : i + h, j : j + w] for i in range(side) for j in range(side)]
  x = rearrange(shifted, "k b h w (g c) -> (b h w) k g c", g=groups)
  kernel = rearrange(kernel, "i j c (g d) -> (i j) c g d", g=groups)
  return jnp.einsum("nkgc,kcgd->ngd", x, kernel).reshape(b, h, w, -1)


class ConvDecoder(nn.Module, kw_only=True):
  """A few convolutions over the whole grid: visible tokens at their places, noise elsewhere.

  Each layer is convolution, norm without scale or shift, GELU, and its input added where the
  widths agree. There is no mask token and no position: the kernel sees what lies where.

  out: values a patch. width, depth: of the layers. kernel: patches a side, odd. groups: of channels
  in a convolution. init_name: of the output layer. dtype: of matrix products.

  Raises:
    ValueError: a size below 1, an even kernel, or groups that don't divide the width.

  Source: facebookresearch/fairseq, examples/data2vec, models/modalities/modules.py.
  """

  out: int
  width: int
  depth: int
  kernel: int = 3
  groups: int = 16
  init_name: str = "normal"
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    one_of(self.init_name, INITS, where="init_name")
    for name in ("width", "depth", "kernel", "groups"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
    if self.kernel % 2 == 0:
      raise ValueError(f"kernel must be odd, found {self.kernel}")
    if self.width % self.groups or self.out % self.groups:
      raise ValueError(
        f"groups={self.groups} must divide the decoder's width={self.width} and the encoder's "
        f"{self.out}"
      )
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: jax.Array, visible: TokenSet, noise: jax.Array, *, grid: tuple[int, int]
  ) -> jax.Array:
    """Predicts the features of every patch.

    Args:
      x: f32[b k out], visible tokens, without class token.
      visible: their positions, index [b k].
      noise: f32[b n out], what stands at the other positions.
      grid: patches (rows, columns), n in all.

    Returns:
      f32[b n out].
    """
    chex.assert_equal_shape_prefix([x, visible.index, visible.valid], 2)
    b, n, d = noise.shape
    index = jnp.where(visible.valid, visible.index, n)  # out of bounds: dropped
    x = jax.vmap(lambda row, i, at: row.at[i].set(at, mode="drop"))(noise, index, x)
    x = x.reshape(b, *grid, d)
    for i in range(self.depth):
      y = nn.Conv(
        self.width,
        (self.kernel, self.kernel),
        feature_group_count=self.groups,
        dtype=self.dtype,
        conv_general_dilated=grouped_conv,
        name=f"conv{i}",
      )(x)
      y = gelu(losses.layer_norm(y))
      x = x + y if x.shape == y.shape else y
    return dense(self, self.out, name="proj")(x.reshape(b, n, -1)).astype(jnp.float32)
