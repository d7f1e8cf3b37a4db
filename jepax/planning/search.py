"""The largest batch that fits, in few tries: each costs a compile."""

from __future__ import annotations

from collections.abc import Callable

MOST_TRIES = 8
CLOSE = 0.05  # a largest batch known to 5 % is known well enough


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

  Memory grows nearly in a straight line with the batch, so each guess follows the line through the
  two nearest sizes known; the bracket around the answer is kept as in bisection.

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
  for _ in range(MOST_TRIES):
    low, high = bracket(known, capacity=capacity)
    high = (most // unit + 1) * unit if high is None else high
    if high - low <= max(unit, low * CLOSE):
      break
    guess = _on_line(known, base=base, capacity=capacity) // unit * unit
    guess = int(min(max(guess, low // unit * unit + unit), (high - 1) // unit * unit))
    known[guess] = need(guess)
  return known


def bracket(known: dict[int, float], *, capacity: float) -> tuple[int, int | None]:
  """The largest batch known to fit, or 0, and the smallest known not to, or None."""
  low = max((b for b, bytes_ in known.items() if bytes_ <= capacity), default=0)
  high = min((b for b, bytes_ in known.items() if bytes_ > capacity), default=None)
  return low, high


def _on_line(known: dict[int, float], *, base: float, capacity: float) -> float:
  """The batch whose need is the capacity, if the two sizes nearest to it lie on a line."""
  points = sorted({0: base, **known}.items(), key=lambda point: abs(point[1] - capacity))[:2]
  (b0, n0), (b1, n1) = points
  slope = (n1 - n0) / (b1 - b0)
  return b0 + (capacity - n0) / slope if slope > 0 else (b0 + b1) / 2
