"""Resizing and blurring of one image as matrix products, inside jit."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp


def _triangle(x: jax.Array) -> jax.Array:
  return jnp.maximum(1 - x, 0)


def _cubic(x: jax.Array) -> jax.Array:
  """Keys' cubic with a = -1/2, as in Pillow."""
  near, far = (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
  return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


FILTERS: dict[str, Callable[[jax.Array], jax.Array]] = {  # of distances, at least 0
  "bilinear": _triangle,
  "bicubic": _cubic,
}


def crop_resize(
  image: jax.Array, box: jax.Array, *, height: int, width: int, interpolation: str = "bilinear"
) -> jax.Array:
  """Resizes the inside of a box, with antialiasing, as two matrix products.

  Args:
    image: f32[h w c].
    box: f32[4], top, left, bottom, right in pixels; need not be whole numbers.
    height: of the result, pixels.
    width: of the result, pixels.
    interpolation: 'bilinear', or 'bicubic', which overshoots at edges: clip its result.

  Returns:
    f32[height width c].

  Source: the same weights as Pillow's Image.resize(box=..., resample=...), which also rounds and
  clips between its two passes.
  """
  chex.assert_rank(image, 3)
  kernel = FILTERS[interpolation]
  rows = _resize_weights(box[0], box[2], kernel, inputs=image.shape[0], outputs=height)
  columns = _resize_weights(box[1], box[3], kernel, inputs=image.shape[1], outputs=width)
  return _separable(image, rows, columns)


def gaussian_blur(image: jax.Array, sigma: jax.Array) -> jax.Array:
  """Gaussian blur whose weights are renormalised at the border.

  Args:
    image: f32[h w c].
    sigma: f32[], pixels, above 0.

  Returns:
    f32[h w c].
  """
  chex.assert_rank(image, 3)
  rows, columns = (_gaussian_weights(sigma, count=n) for n in image.shape[:2])
  return _separable(image, rows, columns)


def _separable(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
  # Full precision: accelerators would otherwise round pixels to bfloat16, that is to 8 bits.
  exact = jax.lax.Precision.HIGHEST
  image = jnp.einsum("oh,hwc->owc", rows, image, precision=exact)
  return jnp.einsum("pw,owc->opc", columns, image, precision=exact)


def _resize_weights(
  start: jax.Array, stop: jax.Array, kernel: Callable, *, inputs: int, outputs: int
) -> jax.Array:
  """Filters, widened to cover what one output pixel shrinks; f32[outputs inputs]."""
  scale = (stop - start) / outputs
  centre = start + (jnp.arange(outputs) + 0.5) * scale
  distance = jnp.abs(jnp.arange(inputs) + 0.5 - centre[:, None]) / jnp.maximum(scale, 1)
  weights = kernel(distance)
  return weights / weights.sum(1, keepdims=True)


def _gaussian_weights(sigma: jax.Array, *, count: int) -> jax.Array:
  position = jnp.arange(count)
  weights = jnp.exp(-0.5 * ((position - position[:, None]) / sigma) ** 2)
  return weights / weights.sum(1, keepdims=True)
