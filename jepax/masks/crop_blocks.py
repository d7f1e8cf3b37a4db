"""DINOv2's masks: rectangles on some of an image's crops, behind a mask token (iBOT, BEiT).

The student sees every patch, the hidden ones as the mask token; so a context is all the others.
"""

from __future__ import annotations

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp

from jepax.masks.tokens import Masks, TokenSet, first

TRIES = 10  # in a row without a new patch, after which a mask stays as it is


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropBlocks:
  """Hides int(n * u) patches, u uniform in `ratio`, of some of the crops of each sample.

  Rectangles are added until the number is reached; each is drawn from area U(smallest, what is
  missing) and log-uniform aspect, and taken only if it adds no more than is missing. A mask can
  end with fewer patches where many draws in a row fail, unless `complete` fills it up.

  Of the crops of a sample, floor(crops * share) are masked, chosen at random, and one more with
  the probability that makes `share` of all in the mean. The reference draws as many from the crops
  of a GPU, and spreads their ratios evenly; one crop's mask has the same distribution here.

  Args:
    grid: (H, W) of a crop in patches, n = H W.
    crops: crops a sample.
    share: of the crops that are masked, in (0, 1].
    ratio: range of the fraction of patches hidden in a masked crop.
    smallest: least area drawn for a rectangle, patches.
    aspect: least height / width; the largest is its inverse.
    complete: fill up to the number with random patches (DINOv3).

  Raises:
    ValueError: a setting out of range, or a ratio that hides no patch at all.

  Source: arXiv 2304.07193; facebookresearch/dinov2, dinov2/data/masking.py and collate.py.
  """

  grid: tuple[int, int]
  crops: int = 2
  share: float = 0.5
  ratio: tuple[float, float] = (0.1, 0.5)
  smallest: int = 4
  aspect: float = 0.3
  complete: bool = False

  def __post_init__(self):
    if len(self.grid) != 2 or min(self.grid) < 2:
      raise ValueError(f"grid must be two numbers of patches (H, W) from 2 on, found {self.grid}")
    if self.crops < 1 or not 0 < self.share <= 1:
      raise ValueError(
        f"crops must be at least 1 and share in (0, 1], found {self.crops} and {self.share}"
      )
    if len(self.ratio) != 2 or not 0 <= self.ratio[0] <= self.ratio[1] <= 1:
      raise ValueError(f"ratio must be (low, high), 0 <= low <= high <= 1, found {self.ratio}")
    if self.smallest < 1 or not 0 < self.aspect <= 1:
      raise ValueError(
        f"smallest must be at least 1 and aspect in (0, 1], found {self.smallest}, {self.aspect}"
      )
    if self.target_size < 1:
      raise ValueError(
        f"ratio={self.ratio} hides less than one of {self.count} patches; raise it to "
        f"{1 / self.count:.3g} or more"
      )
    if self.smallest > self.target_size:
      raise ValueError(
        f"smallest={self.smallest} patches of a block are more than the {self.target_size} that "
        f"ratio={self.ratio} hides of {self.count}"
      )

  @property
  def count(self) -> int:
    """n, patches of a crop."""
    return self.grid[0] * self.grid[1]

  @property
  def masked(self) -> int:
    """The most crops of a sample that are masked."""
    return math.ceil(self.crops * self.share - 1e-6)

  @property
  def context_size(self) -> int:
    """Slots of a crop's visible patches."""
    return self.count

  @property
  def target_size(self) -> int:
    """k, slots of a crop's hidden patches."""
    return int(self.count * self.ratio[1] + 1e-6)

  def __call__(self, keys: jax.Array, step_key: jax.Array) -> Masks:
    """Draws masks; traceable.

    Args:
      keys: [b], one key a sample.
      step_key: [], not used here; samplers share one signature.

    Returns:
      targets [b v k], v crops: the hidden patches in raster order, none for a crop without mask;
      context [b v n]: the visible ones.
    """
    chex.assert_rank([keys, step_key], [1, 0])
    hidden = jax.vmap(self._draw)(keys)  # [b v n]
    return Masks(
      context=_members(~hidden, self.context_size),
      targets=_members(hidden, self.target_size),
      clipped=jnp.zeros(len(keys), bool),
    )

  def _draw(self, key: jax.Array) -> jax.Array:
    """The masks of one sample, bool[v n]."""
    choice_key, extra_key, ratio_key, block_key = jax.random.split(key, 4)
    sure, rest = divmod(self.crops * self.share + 1e-6, 1)
    masked = sure + jax.random.bernoulli(extra_key, rest if self.masked > sure else 0.0)
    chosen = jax.random.permutation(choice_key, self.crops) < masked
    low, high = self.ratio
    ratio = jax.random.uniform(ratio_key, (self.crops,), minval=low, maxval=high)
    wanted = jnp.where(chosen, jnp.floor(self.count * ratio).astype(jnp.int32), 0)
    return jax.vmap(self._fill)(jax.random.split(block_key, self.crops), wanted)

  def _fill(self, key: jax.Array, wanted: jax.Array) -> jax.Array:
    """Adds rectangles to one mask until it has `wanted` patches; bool[n]."""

    def unfinished(state):
      hidden, _, fails = state
      return (hidden.sum() < wanted) & (fails < TRIES)

    def add(state):
      hidden, tries, fails = state
      missing = wanted - hidden.sum()
      block = self._rectangle(jax.random.fold_in(key, tries), missing)
      new = (block & ~hidden).sum()
      fits = (new > 0) & (new <= missing)
      return hidden | (block & fits), tries + 1, jnp.where(fits, 0, fails + 1)

    start = (jnp.zeros(self.count, bool), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    hidden, tries, _ = jax.lax.while_loop(unfinished, add, start)
    if not self.complete:
      return hidden
    noise = jax.random.uniform(jax.random.fold_in(key, tries), (self.count,))
    rank = jnp.argsort(jnp.argsort(hidden + noise, descending=True))
    return rank < wanted

  def _rectangle(self, key: jax.Array, missing: jax.Array) -> jax.Array:
    """One rectangle, bool[n]; empty where its sides don't leave a row and a column free."""
    u = jax.random.uniform(key, (4,))
    area = self.smallest + u[0] * (missing - self.smallest)  # either may be the larger
    ratio = jnp.exp((2 * u[1] - 1) * math.log(1 / self.aspect))
    height, width = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    top = jnp.floor(u[2] * (self.grid[0] - height + 1))
    left = jnp.floor(u[3] * (self.grid[1] - width + 1))
    row, column = jnp.divmod(jnp.arange(self.count), self.grid[1])
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    return inside & (height < self.grid[0]) & (width < self.grid[1])


def _members(chosen: jax.Array, size: int) -> TokenSet:
  """The true places of bool[... n], in order, in `size` slots; there are never more."""
  order = jnp.argsort(~chosen, axis=-1, stable=True)[..., :size].astype(jnp.int32)
  return first(order, chosen.sum(-1, dtype=jnp.int32))
