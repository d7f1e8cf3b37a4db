"""Pre-norm transformer blocks, unrolled or scanned over depth."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from jepax.models.attention import IMPLEMENTATIONS, attention
from jepax.names import one_of
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


def dense(owner: nn.Module, width: int, *, name: str) -> nn.Dense:
  """A linear layer to `width` units with its owner's compute dtype and initialisation."""
  return nn.Dense(width, dtype=owner.dtype, kernel_init=INITS[owner.init_name], name=name)


class Block(nn.Module, kw_only=True):
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
    x = constrain(x)
    qkv = dense(self, 3 * d, name="qkv")(layer_norm("norm1", self.dtype)(x))
    q, k, v = rearrange(qkv, "b n (s h e) -> s b n h e", s=3, h=self.heads)
    if self.keep is not None:
      q, x = q[:, -self.keep :], x[:, -self.keep :]
    y = attention(q, k, v, valid=valid, implementation=self.attention)
    y = dense(self, d, name="proj")(rearrange(y, "b n h e -> b n (h e)"))
    x = x + y.astype(x.dtype)
    y = dense(self, self.mlp_width, name="fc1")(layer_norm("norm2", self.dtype)(x))
    y = dense(self, d, name="fc2")(ACTIVATIONS[self.activation](y))
    return x + y.astype(x.dtype)


class Stack(nn.Module, kw_only=True):
  """The fields of a `Transformer`, and so of every module that holds one.

  width, depth, heads: sizes; mlp_width: hidden units of the MLPs, None for 4 * width.
  activation, init_name, attention, remat: names, see ACTIVATIONS, INITS, REMAT and
  `models.attention`. dtype: of matrix products; parameters and the residual stream are float32.
  scan: one traced block over stacked parameters `blocks` [depth ...] (deep models compile fast)
  instead of `block0`, `block1`, ... (small models run faster). remat: what the backward pass
  recomputes, 'none', 'dots' (all but matrix products) or 'full'.

  Raises:
    ValueError: an unknown name, or a width that the heads don't divide.
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

  def __post_init__(self):
    one_of(self.activation, ACTIVATIONS, where="activation")
    one_of(self.init_name, INITS, where="init_name")
    one_of(self.attention, IMPLEMENTATIONS, where="attention")
    one_of(self.remat, REMAT, where="remat")
    if self.heads < 1 or self.width % self.heads:
      raise ValueError(f"width={self.width} does not divide into heads={self.heads}")
    super().__post_init__()


class Transformer(Stack):
  """A stack of blocks, without a final norm."""

  @nn.compact
  def __call__(
    self, x: jax.Array, valid: jax.Array | None = None, *, keep: int | None = None
  ) -> jax.Array:
    """Runs the blocks.

    Args:
      x: [b n width].
      valid: bool[b n], tokens to attend to; None for all.
      keep: return only the last `keep` tokens, and spare the last block the others.

    Returns:
      [b n width], or [b keep width].
    """
    block = Block
    if self.remat != "none":
      block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not self.scan)
    block = functools.partial(
      block,
      heads=self.heads,
      mlp_width=self.mlp_width or 4 * self.width,
      activation=self.activation,
      init_name=self.init_name,
      attention=self.attention,
      dtype=self.dtype,
    )
    if self.scan:
      x = self._scanned(block(name="blocks"), x, valid)
      return x if keep is None else x[:, -keep:]
    for i in range(self.depth):
      x = block(keep=keep if i == self.depth - 1 else None, name=f"block{i}")(x, valid)
    return x

  def _scanned(self, block: Block, x: jax.Array, valid: jax.Array | None) -> jax.Array:
    body = nn.scan(
      lambda block, x, _: (constrain(block(x, valid)), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.depth,
    )
    return body(block, x, None)[0]


def transformer(owner: Stack) -> Transformer:
  """The blocks of a module that shares their fields, under the name 'transformer'."""
  names = {f.name for f in dataclasses.fields(Stack)} - {"parent", "name"}
  return Transformer(**{name: getattr(owner, name) for name in names}, name="transformer")
