"""Sets of tokens as index arrays of static length, and how to gather by them."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class TokenSet:
  """Up to k token indices a row; static k, so it lives inside jit.

  index: i32[..., k], zero where not valid; valid: bool[..., k], True first, False after.
  """

  index: jax.Array
  valid: jax.Array

  @property
  def size(self) -> jax.Array:
    """Valid tokens of each set, i32[...]."""
    return self.valid.sum(-1, dtype=jnp.int32)


@struct.dataclass
class Masks:
  """What a sampler draws for a batch.

  context: [b k], the tokens the encoder sees; targets: [b m kt], m sets to predict a sample;
  clipped: bool[b], whether a static bound cut tokens from the context.
  """

  context: TokenSet
  targets: TokenSet
  clipped: jax.Array

  def metrics(self) -> dict[str, jax.Array]:
    """f32[] each: mean tokens a context, mean tokens a target set, fraction of clipped contexts."""
    return {
      "mask/context_tokens": self.context.size.mean(dtype=jnp.float32),
      "mask/target_tokens": self.targets.size.mean(dtype=jnp.float32),
      "mask/context_clipped": self.clipped.mean(dtype=jnp.float32),
    }


def first(index: jax.Array, size: jax.Array) -> TokenSet:
  """The set of the first tokens of each row.

  Args:
    index: i32[..., k].
    size: i32[...], how many to take, at most k.
  """
  valid = jnp.arange(index.shape[-1]) < size[..., None]
  return TokenSet(index=jnp.where(valid, index, 0), valid=valid)


def gather(x: jax.Array, tokens: TokenSet) -> jax.Array:
  """Takes the tokens of each set.

  Args:
    x: [b n d].
    tokens: index [b k], or [b m k] for m sets a sample.

  Returns:
    [b k d] or [b m k d]; rows that are not valid hold token 0 and must be masked by the caller.
  """
  chex.assert_rank(x, 3)
  flat = tokens.index.reshape(x.shape[0], -1)  # [b m*k]
  out = jnp.take_along_axis(x, flat[..., None], axis=1)
  return out.reshape(*tokens.index.shape, x.shape[-1])


def to_bool(tokens: TokenSet, *, count: int) -> jax.Array:
  """Membership of each set, bool[..., n] with n = count."""
  chex.assert_equal_shape([tokens.index, tokens.valid])
  hits = jax.nn.one_hot(tokens.index, count, dtype=jnp.int32) * tokens.valid[..., None]
  return hits.sum(-2) > 0
