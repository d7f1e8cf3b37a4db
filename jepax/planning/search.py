"""The largest batch that fits, in few tries: each costs a compile."""

from __future__ import annotations

import math
from collections.abc import Callable

MOST_TRIES = 8
CLOSE = 0.1  # a largest batch known to 10 % is known well enough
FARTHEST = 8  # times the largest known to fit: how far a line through what is known is trusted


def largest(
  need: Callable[[int], float],
  *,
  capacity: float,
  known: dict[int, float],
  base: float,
  unit: int,
  most: int,
) -> dict[int, float]:
  """Tries multiples of `unit` until the largest that fits and the smallest that doesn't are near.

  Memory grows in nearly a straight line with the batch until the compiler starts to save it. So the
  batch at least doubles until one fails, which compilers find quickly; from there on guesses follow
  the line between what fits and what doesn't, a little to the side that has not been seen, and
  every third is in the middle, lest a crooked line be followed for ever.

  Args:
    need: batch -> bytes on each device.
    capacity: bytes that a device has.
    known: at least one batch and its need, from before.
    base: bytes at a batch of none, about: those of the state.
    unit: batches are multiples of this.
    most: the largest batch that makes sense.

  Returns:
    All that is known in the end: `known` and each batch tried.
  """
  known = dict(known)
  for tries in range(MOST_TRIES):
    low, high = bracket(known, capacity=capacity)
    limit = (most // unit + 1) * unit if high is None else high
    margin = max(unit, low * CLOSE)
    if limit - low <= margin:
      break
    points = {0: base, **known}
    if high is None:
      guess = min(max(_on_line(points, 0, low, capacity), 2 * low), FARTHEST * low)
    elif tries % 3 == 2:
      guess = math.sqrt(max(low, unit) * high)
    else:
      guess = _on_line(points, low, high, capacity)
    guess = min(max(guess, low + margin), limit - margin)
    guess = max(int(guess) // unit, low // unit + 1) * unit
    known[guess] = need(guess)
  return known


def bracket(known: dict[int, float], *, capacity: float) -> tuple[int, int | None]:
  """The largest batch known to fit, or 0, and the smallest known not to, or None."""
  low = max((b for b, bytes_ in known.items() if bytes_ <= capacity), default=0)
  high = min((b for b, bytes_ in known.items() if bytes_ > capacity), default=None)
  return low, high


def _on_line(points: dict[int, float], b0: int, b1: int, capacity: float) -> float:
  """The batch whose need is the capacity on the line through those of b0 and b1."""
  slope = (points[b1] - points[b0]) / (b1 - b0)
  return b0 + (capacity - points[b0]) / slope if slope > 0 else FARTHEST * b1
