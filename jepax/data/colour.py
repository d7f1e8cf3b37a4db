"""Colour operations on one image: pure JAX, pixels in [0, 1], each as Pillow and torchvision do it.

An amount is drawn elsewhere (`data.augment`); 1 leaves the image as it is, but for `hue` (0).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


def brightness(image: jax.Array, factor: jax.Array | float) -> jax.Array:
  """Pixels times a factor: f32[h w c] -> f32[h w c]. Source: PIL.ImageEnhance.Brightness."""
  return jnp.clip(image * factor, 0, 1)


def contrast(image: jax.Array, factor: jax.Array | float) -> jax.Array:
  """Distance from the mean grey times a factor, [h w c]. Source: PIL.ImageEnhance.Contrast."""
  mean = _luma(image).mean()
  return jnp.clip((image - mean) * factor + mean, 0, 1)


def saturation(image: jax.Array, factor: jax.Array | float) -> jax.Array:
  """Distance from each pixel's own grey times a factor. Source: PIL.ImageEnhance.Color.

  Args:
    image: f32[h w 3].
    factor: 0 is grey, above 1 more colourful.
  """
  grey = _luma(image)
  return jnp.clip((image - grey) * factor + grey, 0, 1)


def hue(image: jax.Array, shift: jax.Array | float) -> jax.Array:
  """Turns every pixel's hue at constant value and saturation.

  Args:
    image: f32[h w 3].
    shift: fraction of the colour circle, -0.5 to 0.5.

  Source: the HSV formula of Python's colorsys and of torchvision's tensors. On PIL images
  torchvision goes through 8-bit HSV, whose rounding alone moves pixels by several levels.
  """
  red, green, blue = jnp.moveaxis(image, -1, 0)
  value = image.max(-1)
  chroma = value - image.min(-1)
  scale = jnp.where(chroma > 0, chroma, 1)  # grey pixels have no hue, and none is seen
  sixths = jnp.where(
    value == red,
    (green - blue) / scale,
    jnp.where(value == green, (blue - red) / scale + 2, (red - green) / scale + 4),
  )
  place = (jnp.array([5.0, 3.0, 1.0]) + sixths[..., None] + 6 * shift) % 6
  return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)


def grey(image: jax.Array) -> jax.Array:
  """Three equal channels, each the pixel's luma: f32[h w 3]. Source: PIL's convert('L')."""
  return jnp.broadcast_to(_luma(image), image.shape)


def solarise(image: jax.Array) -> jax.Array:
  """Inverts pixels of level 128 and above, [h w c]. Source: PIL.ImageOps.solarize(threshold=128).

  Between two levels the nearer one decides, as if the image had been rounded first.
  """
  return jnp.where(image > 127.5 / 255, 1 - image, image)


def _luma(image: jax.Array) -> jax.Array:
  """f32[h w 1]; a single channel is its own."""
  if image.shape[-1] == 1:
    return image
  # Full precision: accelerators would otherwise round pixels to bfloat16, that is to 8 bits.
  return jnp.dot(image, jnp.array(_LUMA)[:, None], precision=jax.lax.Precision.HIGHEST)
