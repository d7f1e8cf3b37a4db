"""Inverse block masks: what small blocks cover stays visible, the rest is hidden (data2vec 2.0).

Several masks a sample, so that one pass of the teacher serves as many passes of the student.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp

from jepax.masks.tokens import Masks, first


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseBlock:
  """Keeps exactly int(n * (1 - ratio)) patches, most of them in square blocks.

  Blocks are dropped on random centres, cut at the border by clamping their patches onto it. Where
  they cover too many patches, random ones of them are hidden; where too few, random others shown.

  Args:
    grid: (H, W) in patches, n = H W.
    ratio: fraction of patches hidden, in (0, 1).
    adjust: added to the fraction kept when counting blocks, against their overlaps.
    block: side of a block, odd.
    copies: m, masks a sample.

  Raises:
    ValueError: a setting out of range, or one that keeps or hides no patch.

  Source: arXiv 2212.07525, section 3.3; facebookresearch/fairseq, examples/data2vec.
  """

  grid: tuple[int, int]
  ratio: float = 0.8
  adjust: float = 0.07
  block: int = 3
  copies: int = 1

  def __post_init__(self):
    if len(self.grid) != 2 or min(self.grid) < 1:
      raise ValueError(f"grid must be two positive numbers of patches (H, W), found {self.grid}")
    if not 0 < self.ratio < 1 or not 0 <= self.adjust < 1:
      raise ValueError(
        f"ratio must lie in (0, 1) and adjust in [0, 1), found {self.ratio}, {self.adjust}"
      )
    if self.block < 1 or self.block % 2 == 0 or self.copies < 1:
      raise ValueError(
        f"block must be odd and copies at least 1, found {self.block} and {self.copies}"
      )
    if not 0 < self.context_size < self.count:
      raise ValueError(
        f"ratio={self.ratio} keeps {self.context_size} of {self.count} patches; at least one must "
        f"be kept and one hidden: choose a ratio from {1 / self.count:.3g} to "
        f"{1 - 1 / self.count:.3g}"
      )
    if self.block > max(self.grid):
      raise ValueError(f"block={self.block} is wider than the grid of {self.grid} patches")

  @property
  def count(self) -> int:
    """n, patches of the grid."""
    return self.grid[0] * self.grid[1]

  @property
  def blocks(self) -> int:
    """Blocks a mask; they may coincide."""
    return int(self.count * (1 - self.ratio + self.adjust) / self.block**2 + 1e-6)

  @property
  def context_size(self) -> int:
    """k, patches kept."""
    return int(self.count * (1 - self.ratio) + 1e-6)  # see `Random.context_size`

  @property
  def target_size(self) -> int:
    """kt, patches hidden."""
    return self.count - self.context_size

  def __call__(self, keys: jax.Array, step_key: jax.Array) -> Masks:
    """Draws masks; every slot is valid, and target set i belongs to context i.

    Args:
      keys: [b], one key a sample.
      step_key: [], not used here; samplers share one signature.

    Returns:
      context [b m k], targets [b m kt], both in random order.
    """
    chex.assert_rank([keys, step_key], [1, 0])
    split = jax.vmap(lambda key: jax.random.split(key, self.copies))(keys)  # [b m]
    kept, hidden = jax.vmap(jax.vmap(self._draw))(split)
    return Masks(
      context=first(kept, jnp.full(split.shape, self.context_size)),
      targets=first(hidden, jnp.full(split.shape, self.target_size)),
      clipped=jnp.zeros(len(keys), bool),
    )

  def _draw(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One mask: the patches kept, i32[k], and hidden, i32[kt]."""
    centre_key, order_key = jax.random.split(key)
    centres = jax.random.randint(centre_key, (self.blocks,), 0, self.count)
    offsets = jnp.arange(self.block) - self.block // 2
    rows, columns = (
      jnp.clip(x[:, None] + offsets, 0, side - 1)
      for x, side in zip(jnp.divmod(centres, self.grid[1]), self.grid, strict=True)
    )  # [s block]
    cells = rows[:, :, None] * self.grid[1] + columns[:, None, :]
    covered = jnp.zeros(self.count, bool).at[cells].set(True)
    # Covered patches come first and ties fall at random: one sort hides or shows the surplus.
    order = jnp.argsort(covered + jax.random.uniform(order_key, (self.count,)), descending=True)
    return tuple(jnp.split(order, [self.context_size]))
