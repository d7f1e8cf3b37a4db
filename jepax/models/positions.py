"""Tables of patch positions, interpolated to another grid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def interpolate(
  table: np.ndarray | jax.Array,
  *,
  old: tuple[int, int],
  new: tuple[int, int],
  antialias: bool = False,
) -> np.ndarray | jax.Array:
  """Bicubic interpolation of a table of patch positions.

  Args:
    table: f32[rows*columns, d] in raster order, without a row for the class token.
    old: its grid (rows, columns).
    new: the grid wanted.
    antialias: widen the kernel when shrinking; Hugging Face does so for DINOv2 with registers only.

  Returns:
    f32[new rows * new columns, d]; a numpy table is summed in float64, a JAX one in float32.

  Source: torch.nn.functional.interpolate(mode='bicubic', align_corners=False), which
  `interpolate_pos_encoding` calls in transformers' ijepa, vit_mae, dinov2, dinov2_with_registers.
  """
  if old == new:
    return table
  matrix = _antialiased if antialias else _bicubic
  rows, columns = (matrix(n, m) for n, m in zip(old, new, strict=True))
  grid = table.reshape(*old, -1)
  if isinstance(table, np.ndarray):
    out = np.einsum("ir,jc,rcd->ijd", rows, columns, grid.astype(np.float64), optimize=True)
  else:
    rows, columns = (jnp.asarray(w, jnp.float32) for w in (rows, columns))
    exact = jax.lax.Precision.HIGHEST  # bfloat16 would round positions to 8 bits
    out = jnp.einsum("ir,jc,rcd->ijd", rows, columns, grid, precision=exact)
  return out.reshape(new[0] * new[1], -1).astype(np.float32)


def _bicubic(old: int, new: int) -> np.ndarray:
  """[new old] weights of a cubic convolution with a = -0.75; the border is repeated."""
  x = (np.arange(new) + 0.5) * (old / new) - 0.5
  left = np.floor(x).astype(int)
  weights = np.zeros((new, old))
  for tap in range(-1, 3):
    index = np.clip(left + tap, 0, old - 1)
    np.add.at(weights, (np.arange(new), index), _cubic(x - left - tap, -0.75))
  return weights


def _antialiased(old: int, new: int) -> np.ndarray:
  """[new old] weights of a = -0.5, the kernel as wide as a step when shrinking, normalised."""
  step = old / new
  scale = max(step, 1.0)
  center = (np.arange(new) + 0.5) * step
  weights = _cubic((np.arange(old) + 0.5 - center[:, None]) / scale, -0.5)
  return weights / weights.sum(1, keepdims=True)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Keys' cubic convolution kernel, zero from 2 on."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
