"""Frozen features of many images, batch by batch, with one compiled shape."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from jepax.core import Features
from jepax.data.transforms import resize
from jepax.evals.batches import in_batches

PIXELS_SIDE = 32
Encode = Callable[[np.ndarray], Features]  # images u8[b h w c] -> Features, jitted


def extract(encode: Encode, images: np.ndarray, *, batch_size: int) -> np.ndarray:
  """One pooled vector an image.

  Args:
    encode: jitted, images u8[b h w c] -> Features; always called with b = batch_size.
    images: u8[n h w c].
    batch_size: images a call; the last batch is padded and the padding's features dropped.

  Returns:
    f32[n d].

  Raises:
    ValueError: no images, not four axes, or a batch size below 1.
  """
  return _encode(encode, images, batch_size, lambda features: features.pooled)


def extract_tokens(encode: Encode, images: np.ndarray, *, batch_size: int) -> np.ndarray:
  """The tokens of each image, f32[n tokens d], for pictures of a few; arguments as `extract`."""
  return _encode(encode, images, batch_size, lambda features: features.tokens)


def pixels(images: np.ndarray) -> np.ndarray:
  """The baseline that every encoder has to beat: the pixels themselves.

  Args:
    images: u8[n h w c]; a side longer than PIXELS_SIDE is first shrunk to it by averaging areas,
      since a probe of 150,528 features a sample would tell no more and fit nowhere.

  Returns:
    f32[n h*w*c] in [0, 1], h and w at most PIXELS_SIDE.
  """
  _check(images)
  size = tuple(min(side, PIXELS_SIDE) for side in images.shape[1:3])
  if images.shape[1:3] != size:
    images = np.stack([resize(image, size, interpolation="area") for image in images])
  return images.reshape(len(images), -1).astype(np.float32) / 255


def _encode(encode, images, batch_size, part: Callable[[Features], jax.Array]) -> np.ndarray:
  _check(images)
  found = in_batches(lambda x: part(encode(x)), images, batch_size=batch_size)
  return found.astype(np.float32)


def _check(images: np.ndarray) -> None:
  if images.ndim != 4 or len(images) == 0:
    raise ValueError(f"images must be a non-empty u8[n h w c], found shape {images.shape}")
  if images.dtype != np.uint8:
    raise ValueError(f"images must be uint8 in 0..255, found {images.dtype}")
