"""Uniform random masking: keep some tokens, predict all the others (MAE)."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp

from jepax.masks.tokens import Masks, first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random:
  """Keeps int(tokens * (1 - ratio)) tokens as context; the others are one target set.

  Args:
    tokens: n, tokens a sample.
    ratio: fraction of tokens masked, in (0, 1).

  Raises:
    ValueError: a setting out of range, or one that keeps or masks no token.

  Source: arXiv 2111.06377, section 3; the number kept as in the authors' code.
  """

  tokens: int
  ratio: float

  def __post_init__(self):
    if self.tokens < 2:
      raise ValueError(f"tokens must be at least 2 (one to keep, one to mask), found {self.tokens}")
    if not 0 < self.ratio < 1:
      raise ValueError(f"ratio is the fraction of tokens masked, in (0, 1); found {self.ratio}")
    if not 0 < self.context_size < self.tokens:
      raise ValueError(
        f"ratio={self.ratio} keeps {self.context_size} of {self.tokens} tokens; at least one must "
        f"be kept and one masked: choose a ratio in [{1 / self.tokens:.3g}, "
        f"{1 - 1 / self.tokens:.3g}]"
      )

  @property
  def context_size(self) -> int:
    """k, tokens kept."""
    # 10 * (1 - .9) is .9999...98 in binary and must still keep one token.
    return int(self.tokens * (1 - self.ratio) + 1e-6)

  @property
  def target_size(self) -> int:
    """kt, tokens masked."""
    return self.tokens - self.context_size

  def __call__(self, keys: jax.Array, step_key: jax.Array) -> Masks:
    """Draws masks; every slot is valid.

    Args:
      keys: [b], one key a sample.
      step_key: [], not used here; samplers share one signature.

    Returns:
      context [b k], targets [b 1 kt], both in random order.
    """
    chex.assert_rank([keys, step_key], [1, 0])
    noise = jax.vmap(lambda key: jax.random.uniform(key, (self.tokens,)))(keys)
    order = jnp.argsort(noise, axis=1)  # [b n]
    kept, masked = jnp.split(order, [self.context_size], axis=1)
    batch = len(keys)
    return Masks(
      context=first(kept, jnp.full((batch,), self.context_size)),
      targets=first(masked[:, None], jnp.full((batch, 1), self.target_size)),
      clipped=jnp.zeros((batch,), bool),
    )
