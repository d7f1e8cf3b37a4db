"""The narrow transformer that predicts target tokens from context tokens and positions.

Source: I-JEPA, arXiv 2301.08243, and facebookresearch/ijepa 52c1ae9.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn

from jepax.masks.tokens import TokenSet
from jepax.models.transformer import INITS, Transformer, layer_norm
from jepax.models.vit import sincos2d


class Predictor(nn.Module):
  """Each target block is a sequence of its own: the context, then one query a target token.

  width, depth, heads: sizes; mlp_width defaults to 4 * width. The rest as in `Transformer`.
  """

  width: int
  depth: int
  heads: int
  mlp_width: int | None = None
  activation: str = "gelu"
  init_name: str = "normal"
  attention: str = "auto"
  dtype: jnp.dtype = jnp.float32
  scan: bool = False
  remat: str = "none"

  @nn.compact
  def __call__(
    self, x: jax.Array, context: TokenSet, targets: TokenSet, *, grid: tuple[int, int]
  ) -> jax.Array:
    """Predicts the encoder's output at the target tokens.

    Args:
      x: f32[b k d], the encoder's output at the context tokens.
      context: their positions, index [b k].
      targets: the positions to predict, index [b m t].
      grid: patches (rows, columns) of the whole image.

    Returns:
      f32[b m t d].
    """
    chex.assert_equal_shape_prefix([x, context.index], 2)
    chex.assert_rank(targets.index, 3)
    b, m, t = targets.index.shape
    d = x.shape[-1]
    dense = lambda width, name: nn.Dense(
      width, dtype=self.dtype, kernel_init=INITS[self.init_name], name=name
    )
    position = jnp.asarray(sincos2d(grid, self.width))
    x = dense(self.width, "embed")(x).astype(jnp.float32) + position[context.index]  # [b k w]
    query = self.param("mask_token", INITS["normal"], (1, 1, self.width))
    queries = query + position[targets.index]  # [b m t w]
    x = jnp.concatenate([repeat(x, "b k w -> b m k w", m=m), queries], axis=2)
    valid = jnp.concatenate([repeat(context.valid, "b k -> b m k", m=m), targets.valid], axis=2)
    blocks = Transformer(
      self.depth,
      self.heads,
      self.mlp_width or 4 * self.width,
      self.activation,
      self.init_name,
      self.attention,
      self.dtype,
      self.scan,
      self.remat,
      name="transformer",
    )
    x = blocks(rearrange(x, "b m n w -> (b m) n w"), rearrange(valid, "b m n -> (b m) n"), keep=t)
    x = dense(d, "proj")(layer_norm("norm", self.dtype)(x)).astype(jnp.float32)
    return rearrange(x, "(b m) t d -> b m t d", b=b, m=m)
