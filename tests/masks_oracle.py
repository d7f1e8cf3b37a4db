"""What mask samplers are tested with: draws, checks, and distributions found by enumeration.

Means are compared within 5 standard errors: with fixed keys a test never flips, and a true
distribution would fail one comparison in two million.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from scipy import stats

from jepax.masks import Masks, TokenSet


def draw(sampler, count: int, seed: int = 0) -> Masks:
  key, step_key = jax.random.split(jax.random.key(seed))
  return jax.device_get(jax.jit(sampler)(jax.random.split(key, count), step_key))


def draw_steps(sampler, steps: int, count: int, seed: int = 0) -> Masks:
  key, step_key = jax.random.split(jax.random.key(seed))
  keys = jax.random.split(key, (steps, count))
  return jax.device_get(jax.jit(jax.vmap(sampler))(keys, jax.random.split(step_key, steps)))


def member(tokens: TokenSet, count: int) -> np.ndarray:
  """bool[..., n], having checked that no valid index repeats and that padding is last and 0."""
  index, valid = np.asarray(tokens.index), np.asarray(tokens.valid)
  assert index.shape == valid.shape and index.dtype == np.int32 and valid.dtype == bool
  assert (index >= 0).all() and (index < count).all() and (index[~valid] == 0).all()
  assert (valid[..., :-1] >= valid[..., 1:]).all()
  out = np.zeros((*index.shape[:-1], count + 1), bool)
  np.put_along_axis(out, np.where(valid, index, count), True, axis=-1)
  assert (out[..., :count].sum(-1) == valid.sum(-1)).all()
  return out[..., :count]


def check_near(units: np.ndarray, expected, *, slack=0.0):
  """The mean of independent units, axis 0, within 5 standard errors of what is expected."""
  error = units.std(0) / math.sqrt(len(units))
  off = np.abs(units.mean(0) - expected)
  assert (off <= 5 * error + slack).all(), (off.max(), (off / (error + 1e-12)).max())


def sides(tokens: TokenSet, width: int) -> np.ndarray:
  """(h, w) of each block [..., 2], having checked that it is a full rectangle."""
  index, valid = tokens.index, tokens.valid
  row, col = np.divmod(index, width)
  h, w = (np.where(valid, x, 0).max(-1) - np.where(valid, x, width).min(-1) + 1 for x in (row, col))
  assert (h * w == valid.sum(-1)).all()
  return np.stack([h, w], -1)


def check_frequencies(found: np.ndarray, expected: dict):
  """Chi-square of drawn sizes [..., 2] against {(h, w): probability}."""
  seen, counts = np.unique(found.reshape(-1, 2), axis=0, return_counts=True)
  counts = dict(zip(map(tuple, seen.tolist()), counts.tolist(), strict=True))
  assert set(counts) <= set(expected)
  total = sum(counts.values())
  observed = [counts.pop(size, 0) for size in expected]
  p = stats.chisquare(observed, [q * total for q in expected.values()]).pvalue
  assert p > 1e-6, p  # as improbable as 5 standard errors


# The expected distributions, by enumeration -------------------------------------------------------


def free_probabilities(grid, scale, aspect, points=20_000) -> dict:
  """P(h, w) when scale and aspect are independent: exact in scale, midpoints over aspect."""
  n = grid[0] * grid[1]
  a = aspect[0] + (np.arange(points) + 0.5) / points * (aspect[1] - aspect[0])
  out = {}
  for h in range(1, grid[0] + 1):
    for w in range(1, grid[1] + 1):
      h_low, w_low = (x - 0.5 if x > 1 else 0.0 for x in (h, w))
      h_high, w_high = (x + 0.5 if x < g else np.inf for x, g in zip((h, w), grid, strict=True))
      low = np.maximum(np.maximum(h_low**2 / a, w_low**2 * a) / n, scale[0])
      high = np.minimum(np.minimum(h_high**2 / a, w_high**2 * a) / n, scale[1])
      p = np.clip(high - low, 0, None).mean() / (scale[1] - scale[0])
      if p > 0:
        out[h, w] = p
  return out


def coverage(probabilities: dict, grid, area) -> np.ndarray:
  """P(patch in block), [n], for a block placed anywhere in the area's top left part of the grid."""

  def line(side, length, limit):
    tops = np.arange(limit - side + 1)[:, None]
    cells = np.arange(length)
    return ((cells >= tops) & (cells < tops + side)).mean(0)

  total = sum(
    p * np.outer(line(h, grid[0], area[0]), line(w, grid[1], area[1]))
    for (h, w), p in probabilities.items()
  )
  return total.ravel()


def all_places(size, area) -> list[np.ndarray]:
  """The patches, bool[n], of a block at each of its places in an area."""
  places = []
  for top, left in np.ndindex(area[0] - size[0] + 1, area[1] - size[1] + 1):
    cover = np.zeros(area, bool)
    cover[top : top + size[0], left : left + size[1]] = True
    places.append(cover.ravel())
  return places
