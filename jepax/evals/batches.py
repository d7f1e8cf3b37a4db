"""A function over many rows, with one compiled shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def in_batches(function: Callable[[np.ndarray], Any], x: np.ndarray, *, batch_size: int) -> Any:
  """Calls a function on batches of one size; the last is padded with zeros, its results cut.

  Args:
    function: [batch_size ...] -> a tree of arrays [batch_size ...].
    x: [n ...].
    batch_size: rows a call.

  Returns:
    The tree, of numpy arrays [n ...].

  Raises:
    ValueError: no rows, or a batch size below 1.
  """
  if batch_size < 1 or len(x) == 0:
    raise ValueError(
      f"batch_size must be at least 1 and there must be rows; found {batch_size} and {len(x)}"
    )
  found = []
  for start in range(0, len(x), batch_size):
    rows = x[start : start + batch_size]
    padded = np.pad(rows, [(0, batch_size - len(rows)), *[(0, 0)] * (x.ndim - 1)])
    found.append(jax.device_get(function(padded)))
  last = len(x) - batch_size * (len(found) - 1)
  found[-1] = jax.tree.map(lambda v: v[:last], found[-1])
  return jax.tree.map(lambda *parts: np.concatenate(parts), *found)
