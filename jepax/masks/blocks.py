"""Which block sizes can be drawn on a grid: plain Python, settled before anything compiles.

Everywhere h and w are a block's sides in patches, n the grid's patches, the scale s the block's
share of them and the aspect a = h / w.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Range = tuple[float, float]
Size = tuple[int, int]  # (h, w)

IJEPA_DRAWS = 2**24  # torch.rand in float32 is k / 2^24 with k uniform on the integers


def free_sizes(grid: Size, scale: Range, aspect: Range) -> list[Size]:
  """Every size a block can have whose scale and aspect are drawn independently.

  Such a block has h = clip(round(sqrt(n s a)), 1, H), w = clip(round(sqrt(n s / a)), 1, W).

  Returns:
    The (h, w), ascending. Exact, but for sizes within float32 rounding of the ranges' edges,
    which are included.
  """
  return [
    (h, w)
    for h in range(1, grid[0] + 1)
    for w in range(1, grid[1] + 1)
    if _reachable(h, w, grid, scale, aspect)
  ]


def _reachable(h: int, w: int, grid: Size, scale: Range, aspect: Range) -> bool:
  """Whether some (s, a) in the ranges rounds to (h, w).

  In the plane of (log s, log a) the ranges are an upright box, and what rounds to (h, w) is a box
  turned by 45 degrees. Convex shapes miss each other only if one of their sides' directions
  separates them, so it is enough that they overlap along h, along w, along s and along a.
  """
  n = grid[0] * grid[1]
  h_low, h_high = _rounds_to(h, grid[0])
  w_low, w_high = _rounds_to(w, grid[1])
  return (
    _overlap((h_low**2 / n, h_high**2 / n), (scale[0] * aspect[0], scale[1] * aspect[1]))
    and _overlap((w_low**2 / n, w_high**2 / n), (scale[0] / aspect[1], scale[1] / aspect[0]))
    and _overlap((h_low * w_low / n, h_high * w_high / n), scale)
    and _overlap((h_low / w_high, h_high / w_low), aspect)
  )


def _rounds_to(side: int, limit: int) -> Range:
  """The real numbers that round, then clip to [1, limit], to this side."""
  return (side - 0.5 if side > 1 else 1e-9), (side + 0.5 if side < limit else math.inf)


def _overlap(a: Range, b: Range) -> bool:
  slack = 1 + 1e-5  # far above float32 rounding, far below what a setting could mean
  return a[0] <= b[1] * slack and b[0] <= a[1] * slack


class SizeTable(NamedTuple):
  """I-JEPA's block size as a step function of one 24-bit draw.

  Size i is (heights[i], widths[i]), for draws k with breaks[i - 1] <= k < breaks[i].
  breaks: i32[s - 1], ascending; heights, widths: i32[s].
  """

  breaks: np.ndarray
  heights: np.ndarray
  widths: np.ndarray

  @property
  def sizes(self) -> list[Size]:
    """The distinct (h, w), ascending."""
    return sorted(set(zip(self.heights.tolist(), self.widths.tolist(), strict=True)))


def ijepa_sizes(grid: Size, scale: Range, aspect: Range) -> SizeTable:
  """The reference's block sizes, exact for each of the 2^24 numbers its generator can give.

  Quirks kept: one uniform sets scale and aspect together, so that tall blocks are large and wide
  ones small; the scaled area is cut to an integer before the root; Python rounds halves to even;
  sides end at one less than the grid's.

  Source: facebookresearch/ijepa, src/masks/multiblock.py, _sample_block_size.
  """

  def size(k: int) -> tuple[int, int, int]:
    u = k / IJEPA_DRAWS
    area = int(grid[0] * grid[1] * (scale[0] + u * (scale[1] - scale[0])))
    a = aspect[0] + u * (aspect[1] - aspect[0])
    h, w = round(math.sqrt(area * a)), round(math.sqrt(area / a))
    return min(h, grid[0] - 1), min(w, grid[1] - 1), area

  # The area only grows with k, and under one area h only grows and w only shrinks: so where the
  # two ends of an interval agree in all three, everything between them does.
  starts = [0, *_changes(size, 0, IJEPA_DRAWS - 1)]
  sizes = [size(k)[:2] for k in starts]
  new = [i for i in range(len(sizes)) if i == 0 or sizes[i] != sizes[i - 1]]
  heights, widths = np.array([sizes[i] for i in new], np.int32).T
  return SizeTable(np.array([starts[i] for i in new[1:]], np.int32), heights, widths)


def _changes(f: Callable[[int], tuple], low: int, high: int) -> list[int]:
  """Where f takes a new value in (low, high], if f is constant wherever two ends agree."""
  if f(low) == f(high):
    return []
  if high - low == 1:
    return [high]
  middle = (low + high) // 2
  return _changes(f, low, middle) + _changes(f, middle, high)


def most_covered(size: Size, area: Size, count: int) -> int:
  """Upper bound of the patches that `count` blocks of one size can cover in an area.

  A column crossed by q blocks has at most min(H, q h) patches covered, and all columns together
  are crossed count * w times; the sum is largest when these are spread evenly. Rows likewise.
  """

  def bound(length: int, lines: int, along: int, across: int) -> int:
    q, r = divmod(count * across, lines)
    return (lines - r) * min(length, q * along) + r * min(length, (q + 1) * along)

  return min(bound(area[0], area[1], *size), bound(area[1], area[0], *size[::-1]))


def largest_context(contexts: list[Size], targets: list[Size], area: Size) -> int:
  """The most patches a context block keeps: all targets coincide in the corner opposite to it."""
  return max(
    eh * ew - max(0, eh + h - area[0]) * max(0, ew + w - area[1])
    for eh, ew in contexts
    for h, w in targets
  )
