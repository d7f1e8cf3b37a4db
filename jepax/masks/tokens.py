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
