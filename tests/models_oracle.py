"""Encoder, predictor and decoder of the fact sheets, one sequence at a time, in float64 numpy.

Written from the papers' equations and the references' conventions, not from `jepax.models`:
loops over heads, patches and positions, no masks (a token that is not there is left out).
"""

from __future__ import annotations

import math

import numpy as np


def vit(params, image, *, patch: int, heads: int, ids=None) -> np.ndarray:
  """Encodes one image f[h w c], or its patches `ids` alone -> [k d], class token first if any."""
  rows, columns = image.shape[0] // patch, image.shape[1] // patch
  tokens = []
  for i in range(rows * columns) if ids is None else ids:
    r, c = divmod(int(i), columns)
    pixels = image[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
    flat = [pixels[y, x, z] for y in range(patch) for x in range(patch) for z in range(3)]
    embedded = linear(params["embed"], np.asarray(flat, np.float64))
    tokens.append(embedded + position(r, c, embedded.size))
  if "class_token" in params:
    tokens.insert(0, params["class_token"][0, 0])
  return norm(params["norm"], transformer(params["transformer"], np.stack(tokens), heads))


def predictor(params, context, ids, targets, *, columns: int, heads: int) -> np.ndarray:
  """One target block of one sample: context [k d] at `ids` -> prediction at `targets` [t d]."""
  x = linear(params["embed"], context)
  width = x.shape[-1]
  x = x + [position(*divmod(int(i), columns), width) for i in ids]
  queries = [
    params["mask_token"][0, 0] + position(*divmod(int(i), columns), width) for i in targets
  ]
  x = transformer(params["transformer"], np.concatenate([x, queries]), heads)
  return linear(params["proj"], norm(params["norm"], x)[len(ids) :])


def decoder(params, x, visible, hidden, *, columns: int, heads: int) -> np.ndarray:
  """MAE: x [1+k d] of class token and visible patches -> pixels of the hidden ones [t out].

  Mask tokens are put in their places in raster order, as the paper has it.
  """
  x = linear(params["embed"], x)
  token, width = params["mask_token"][0, 0], x.shape[-1]
  image = {int(i): x[1 + j] for j, i in enumerate(visible)} | {int(i): token for i in hidden}
  order = sorted(image)
  tokens = [image[i] + position(*divmod(i, columns), width) for i in order]
  x = transformer(params["transformer"], np.stack([x[0], *tokens]), heads)
  x = linear(params["proj"], norm(params["norm"], x))
  return x[[1 + order.index(int(i)) for i in hidden]]


def position(row: int, column: int, width: int) -> np.ndarray:
  """[sin, cos] of the column over a quarter of the width each, then of the row."""
  code = []
  for p in (column, row):
    angles = [p * 10000 ** (-i / (width // 4)) for i in range(width // 4)]
    code += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
  return np.asarray(code)


def transformer(params, x: np.ndarray, heads: int) -> np.ndarray:
  """Blocks `block0`, `block1`, ... in order; x [n d]."""
  for i in range(len(params)):
    p = params[f"block{i}"]
    x = x + linear(p["proj"], attend(linear(p["qkv"], norm(p["norm1"], x)), heads))
    x = x + linear(p["fc2"], gelu(linear(p["fc1"], norm(p["norm2"], x))))
  return x


def attend(qkv: np.ndarray, heads: int) -> np.ndarray:
  """qkv [n 3d]: all of q, all of k, all of v, each with its heads side by side."""
  q, k, v = np.split(qkv, 3, axis=-1)
  size = q.shape[-1] // heads
  out = []
  for h in range(heads):
    part = slice(h * size, (h + 1) * size)
    weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
    out.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
  return np.concatenate(out, -1)


def linear(params, x: np.ndarray) -> np.ndarray:
  return x @ params["kernel"] + params["bias"]


def norm(params, x: np.ndarray) -> np.ndarray:
  centred = x - x.mean(-1, keepdims=True)
  return (
    centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * params["scale"]
    + params["bias"]
  )


def gelu(x: np.ndarray) -> np.ndarray:
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
