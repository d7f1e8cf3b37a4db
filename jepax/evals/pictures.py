"""What features look like: neighbours, a map of the embedding, and patches as colours."""

from __future__ import annotations

import numpy as np


def nearest(queries: np.ndarray, bank: np.ndarray, *, k: int) -> np.ndarray:
  """The k bank vectors of largest cosine with each query, nearest first.

  Args:
    queries: f32[q d].
    bank: f32[n d]; leave the queries out of it, or each finds itself.
    k: at most n.

  Returns:
    i64[q k], indices into the bank.

  Raises:
    ValueError: widths that differ, or k out of range.
  """
  if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
    raise ValueError(
      f"queries and bank must be [q d] and [n d], found {queries.shape} and {bank.shape}"
    )
  if not 1 <= k <= len(bank):
    raise ValueError(f"k must lie in 1..{len(bank)}, the size of the bank, found {k}")
  similarity = _unit(queries) @ _unit(bank).T
  return np.argsort(-similarity, axis=1, kind="stable")[:, :k]


def embed2d(features: np.ndarray) -> np.ndarray:
  """The two principal components of each vector, from an exact SVD.

  Args:
    features: f32[n d], d at least 2.

  Returns:
    f32[n 2]; the sign of each axis is fixed, so equal features give an equal map.
  """
  if features.ndim != 2 or min(features.shape) < 2:
    raise ValueError(f"features must be [n d] with n, d >= 2, found shape {features.shape}")
  return _principal(features, 2)


def patch_pca(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Patches as colours: the first three principal components over the patches of all images.

  Args:
    tokens: f32[b n d], the patch tokens in raster order, without class or register tokens.
    grid: patches (rows, columns), of product n.

  Returns:
    u8[b h w 3]; each component runs over 0..255 between its 1st and 99th percentile.

  Raises:
    ValueError: a grid that does not hold n patches, or fewer than 3 dimensions.
  """
  rows, columns = grid
  if tokens.ndim != 3 or tokens.shape[1] != rows * columns:
    raise ValueError(
      f"tokens must be [b n d] with n = {rows * columns} for grid {grid}, found {tokens.shape}; "
      "drop class and register tokens first"
    )
  flat = tokens.reshape(-1, tokens.shape[-1])
  if min(flat.shape) < 3:
    raise ValueError(f"three components need 3 patches and 3 dimensions, found {flat.shape}")
  parts = _principal(flat, 3)
  # Percentiles, so that one stray patch does not wash out all the others.
  low, high = np.percentile(parts, [1, 99], axis=0)
  scaled = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
  return np.rint(255 * scaled).astype(np.uint8).reshape(len(tokens), rows, columns, 3)


def _principal(x: np.ndarray, count: int) -> np.ndarray:
  """Projections on the first principal axes, f32[n count]; each axis's largest entry is > 0."""
  centred = x.astype(np.float64) - x.mean(0, dtype=np.float64)
  axes = np.linalg.svd(centred, full_matrices=False)[2][:count]
  largest = np.abs(axes).argmax(1)
  axes *= np.sign(axes[np.arange(count), largest])[:, None]
  return (centred @ axes.T).astype(np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
