"""Pre-norm transformer blocks, unrolled or scanned over depth."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from jepax.models.attention import attention
from jepax.sharding import constrain

INITS: dict[str, Callable[..., jax.Array]] = {
  "normal": nn.initializers.normal(0.02),  # I-JEPA: its truncation at +-2 is absolute, so none
  "xavier": nn.initializers.xavier_uniform(),  # MAE
}
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
  "relu": nn.relu,
}
REMAT: dict[str, Callable | None] = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


def layer_norm(name: str, dtype: jnp.dtype) -> nn.LayerNorm:
  """LayerNorm with the field's epsilon; statistics in float32, output in `dtype`."""
  return nn.LayerNorm(epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); the residual stream keeps x's dtype.

  heads: attention heads; mlp_width: hidden units; keep: return only the last `keep` tokens
  (the others still serve as keys and values), None for all.
  """

  heads: int
  mlp_width: int
  activation: str = "gelu"
  init_name: str = "normal"
  attention: str = "auto"
  dtype: jnp.dtype = jnp.float32
  keep: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """x: [b n d], valid: bool[b n] or None -> [b n d], or [b keep d]."""
    d = x.shape[-1]
    dense = lambda width, name: nn.Dense(
      width, dtype=self.dtype, kernel_init=INITS[self.init_name], name=name
    )
    x = constrain(x)
    qkv = dense(3 * d, "qkv")(layer_norm("norm1", self.dtype)(x))
    q, k, v = rearrange(qkv, "b n (s h e) -> s b n h e", s=3, h=self.heads)
    if self.keep is not None:
      q, x = q[:, -self.keep :], x[:, -self.keep :]
    y = attention(q, k, v, valid=valid, implementation=self.attention)
    x = x + dense(d, "proj")(rearrange(y, "b n h e -> b n (h e)")).astype(x.dtype)
    y = dense(self.mlp_width, "fc1")(layer_norm("norm2", self.dtype)(x))
    return x + dense(d, "fc2")(ACTIVATIONS[self.activation](y)).astype(x.dtype)


class Transformer(nn.Module):
  """A stack of blocks.

  depth, heads, mlp_width: sizes. activation, init_name, attention: names, see the tables above.
  scan: one traced block over stacked parameters `blocks` [depth ...] (deep models compile fast)
  instead of `block0`, `block1`, ... (small models run faster). remat: what the backward pass
  recomputes, 'none', 'dots' (all but matrix products) or 'full'.

  Raises:
    ValueError: a name that the tables don't hold.
  """

  depth: int
  heads: int
  mlp_width: int
  activation: str = "gelu"
  init_name: str = "normal"
  attention: str = "auto"
  dtype: jnp.dtype = jnp.float32
  scan: bool = False
  remat: str = "none"

  def __post_init__(self):
    tables = (("activation", ACTIVATIONS), ("init_name", INITS), ("remat", REMAT))
    for field, table in tables:
      if getattr(self, field) not in table:
        raise ValueError(f"{field} {getattr(self, field)!r} is unknown; allowed: {sorted(table)}")
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: jax.Array, valid: jax.Array | None = None, *, keep: int | None = None
  ) -> jax.Array:
    """x: [b n d], valid: bool[b n] keys -> [b n d], or its last `keep` tokens [b keep d]."""
    if x.shape[-1] % self.heads:
      raise ValueError(f"width {x.shape[-1]} does not divide into {self.heads} heads")
    block = Block
    if self.remat != "none":
      block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not self.scan)
    sizes = (self.heads, self.mlp_width, self.activation, self.init_name, self.attention)
    if self.scan:
      x = self._scanned(block(*sizes, self.dtype, name="blocks"), x, valid)
      return x if keep is None else x[:, -keep:]
    for i in range(self.depth):
      last = keep if i == self.depth - 1 else None
      x = block(*sizes, self.dtype, last, name=f"block{i}")(x, valid)
    return x

  def _scanned(self, block: Block, x: jax.Array, valid: jax.Array | None) -> jax.Array:
    body = nn.scan(
      lambda block, x, _: (constrain(block(x, valid)), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.depth,
    )
    return body(block, x, None)[0]
