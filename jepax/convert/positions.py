"""Position tables at another grid: interpolated as Hugging Face does, or recomputed.

The two give different numbers, so nothing here chooses: `weights.Weights.at` asks for a name.
"""

from __future__ import annotations

import numpy as np

from jepax.models.positions import interpolate
from jepax.models.vit import sincos2d

CHOICES = ("interpolate", "recompute")

__all__ = ["CHOICES", "interpolate", "sincos_table"]


def sincos_table(grid: tuple[int, int], width: int, *, class_token: bool) -> np.ndarray:
  """The frozen table f32[(1+)rows*columns, d], with a row of zeros first for a class token."""
  return np.pad(sincos2d(grid, width), ((int(class_token), 0), (0, 0)))
