"""Augmentation on the device: pure JAX, inside jit, every sample by its own key."""

from __future__ import annotations

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
_CROP, _FLIP, _BRIGHTNESS, _CONTRAST, _BLUR = range(5)  # folded into a sample's key


@dataclasses.dataclass(frozen=True)
class Augment:
  """Crop, flip, brightness, contrast, blur, normalise, in this order; what is off costs nothing.

  A draw of one operation does not depend on which others are on.

  mean, std: per channel, of pixels in [0, 1].
  crop_scale: range of the crop's area, fraction of the image; (1, 1) is no crop.
  crop_ratio: range of the crop's width / height, log-uniform.
  flip: probability of a left-right flip.
  brightness, contrast: greatest relative change, 0 to 1.
  blur: probability of a Gaussian blur, whose sigma is uniform in blur_sigma, pixels.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  crop_scale: tuple[float, float] = (1.0, 1.0)
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: float = 0.0
  brightness: float = 0.0
  contrast: float = 0.0
  blur: float = 0.0
  blur_sigma: tuple[float, float] = (0.1, 2.0)

  def __post_init__(self):
    check_normalisation(self.mean, self.std)
    for name in ("flip", "brightness", "contrast", "blur"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name} must be from 0 to 1, found {getattr(self, name)}")
    for name in ("crop_scale", "crop_ratio", "blur_sigma"):
      pair = getattr(self, name)
      if len(pair) != 2 or not 0 < pair[0] <= pair[1] < math.inf:
        raise ValueError(f"{name} must be (low, high) with 0 < low <= high, found {pair}")
    if self.crop_scale[1] > 1:
      raise ValueError(f"crop_scale is a fraction of the image, at most 1; found {self.crop_scale}")

  def __call__(self, keys: jax.Array, images: jax.Array) -> jax.Array:
    """Augments and normalises.

    Args:
      keys: one a sample, [b] (or raw, u32[b 2]).
      images: u8[b h w c].

    Returns:
      f32[b h w c].
    """
    self._check(images)
    chex.assert_equal_shape_prefix([keys, images], 1)
    images = jax.vmap(self._one)(keys, images.astype(jnp.float32) / 255)
    return _normalise(images, self.mean, self.std)

  def clean(self, images: jax.Array) -> jax.Array:
    """Only normalises: u8[b h w c] -> f32[b h w c]."""
    self._check(images)
    return normalise(images, mean=self.mean, std=self.std)

  def _one(self, key: jax.Array, image: jax.Array) -> jax.Array:
    """One image, f32[h w c] in [0, 1]."""
    height, width, _ = image.shape
    if self.crop_scale != (1.0, 1.0):
      box = self._box(jax.random.fold_in(key, _CROP), height, width)
      image = crop_resize(image, box, height=height, width=width)
    if self.flip:
      flipped = jax.random.bernoulli(jax.random.fold_in(key, _FLIP), self.flip)
      image = jnp.where(flipped, image[:, ::-1], image)
    if self.brightness:
      factor = _factor(jax.random.fold_in(key, _BRIGHTNESS), self.brightness)
      image = jnp.clip(image * factor, 0, 1)
    if self.contrast:
      factor = _factor(jax.random.fold_in(key, _CONTRAST), self.contrast)
      image = jnp.clip((image - _mean_grey(image)) * factor + _mean_grey(image), 0, 1)
    if self.blur:
      image = self._maybe_blur(jax.random.fold_in(key, _BLUR), image)
    return image

  def _box(self, key: jax.Array, height: int, width: int) -> jax.Array:
    """The first of 10 random boxes that fits, else the whole image; (top, left, bottom, right)."""
    area, aspect, place = jax.random.split(key, 3)
    area = jax.random.uniform(area, (10,), minval=self.crop_scale[0], maxval=self.crop_scale[1])
    low, high = (math.log(ratio) for ratio in self.crop_ratio)
    aspect = jnp.exp(jax.random.uniform(aspect, (10,), minval=low, maxval=high))
    size = jnp.sqrt(area * height * width * jnp.stack([1 / aspect, aspect]))  # [2 10], (h, w)
    whole = jnp.array([height, width], jnp.float32)
    fits = (size <= whole[:, None]).all(0)
    size = jnp.where(fits.any(), size[:, jnp.argmax(fits)], whole)
    start = jax.random.uniform(place, (2,)) * (whole - size)
    return jnp.concatenate([start, start + size])

  def _maybe_blur(self, key: jax.Array, image: jax.Array) -> jax.Array:
    chosen, width = jax.random.split(key)
    sigma = jax.random.uniform(width, minval=self.blur_sigma[0], maxval=self.blur_sigma[1])
    blurred = gaussian_blur(image, sigma)
    return jnp.where(jax.random.bernoulli(chosen, self.blur), blurred, image)

  def _check(self, images: jax.Array) -> None:
    chex.assert_rank(images, 4)
    chex.assert_type(images, jnp.uint8)
    if images.shape[-1] != len(self.mean):
      raise ValueError(
        f"images have {images.shape[-1]} channels, mean and std are given for {len(self.mean)}"
      )


def check_normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
  """Raises ValueError unless there is one number a channel, 1 or 3, and no std of 0."""
  if len(mean) not in (1, 3) or len(std) != len(mean) or min(std) <= 0:
    raise ValueError(
      f"mean and std must hold one number a channel (1 or 3), std above 0; found {mean}, {std}"
    )


def normalise(images: jax.Array, *, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
  """(images / 255 - mean) / std: u8[b h w c] -> f32[b h w c]."""
  return _normalise(images.astype(jnp.float32) / 255, mean, std)


def _normalise(images, mean, std):
  return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def crop_resize(image: jax.Array, box: jax.Array, *, height: int, width: int) -> jax.Array:
  """Resizes the inside of a box, bilinear with antialiasing, as two matrix products.

  Args:
    image: f32[h w c].
    box: f32[4], top, left, bottom, right in pixels; need not be whole numbers.
    height: of the result, pixels.
    width: of the result, pixels.

  Returns:
    f32[height width c].
  Source: the same weights as Pillow's Image.resize(box=..., resample=BILINEAR).
  """
  chex.assert_rank(image, 3)
  rows = _resize_weights(box[0], box[2], inputs=image.shape[0], outputs=height)
  columns = _resize_weights(box[1], box[3], inputs=image.shape[1], outputs=width)
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


def _resize_weights(start: jax.Array, stop: jax.Array, *, inputs: int, outputs: int) -> jax.Array:
  """Triangle filters, widened to cover what one output pixel shrinks; f32[outputs inputs]."""
  scale = (stop - start) / outputs
  centre = start + (jnp.arange(outputs) + 0.5) * scale
  distance = jnp.abs(jnp.arange(inputs) + 0.5 - centre[:, None]) / jnp.maximum(scale, 1)
  weights = jnp.maximum(1 - distance, 0)
  return weights / weights.sum(1, keepdims=True)


def _gaussian_weights(sigma: jax.Array, *, count: int) -> jax.Array:
  position = jnp.arange(count)
  weights = jnp.exp(-0.5 * ((position - position[:, None]) / sigma) ** 2)
  return weights / weights.sum(1, keepdims=True)


def _factor(key: jax.Array, change: float) -> jax.Array:
  return jax.random.uniform(key, minval=1 - change, maxval=1 + change)


def _mean_grey(image: jax.Array) -> jax.Array:
  grey = image @ jnp.array(_LUMA) if image.shape[-1] == 3 else image
  return grey.mean()
