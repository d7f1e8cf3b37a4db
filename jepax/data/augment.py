"""Augmentation on the device: pure JAX, inside jit, every sample by its own key."""

from __future__ import annotations

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp

from jepax.data import colour
from jepax.data.resample import FILTERS, crop_resize, gaussian_blur
from jepax.names import one_of

# Folded into a sample's key, one a draw: a new operation takes the next number.
(
  _CROP,
  _FLIP,
  _BRIGHTNESS,
  _CONTRAST,
  _BLUR,
  _SATURATION,
  _HUE,
  _JITTER,
  _ORDER,
  _GREY,
  _SOLARISE,
) = range(11)

_SHARES = (
  "flip", "brightness", "contrast", "saturation", "jitter", "grey", "blur", "solarise"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Augment:
  """One random view of an image, by the steps below in their order; what is off costs nothing.

  A draw of one operation does not depend on which others are on.

  mean, std: per channel, of pixels in [0, 1].
  size: pixels a side of the view; None for the image's own. With it crop_scale acts always.
  crop_scale: range of the crop's area, fraction of the image; (1, 1) is no crop.
  crop_ratio: range of the crop's width / height, log-uniform.
  interpolation: of the crop, 'bilinear' or 'bicubic', both antialiased.
  flip: probability of a left-right flip.
  jitter: probability that the next four are applied (torchvision's ColorJitter).
  brightness, contrast, saturation: greatest relative change, 0 to 1.
  hue: greatest turn, fraction of the colour circle, 0 to 0.5.
  shuffle: apply those four in random order, not in this one.
  grey: probability of no colour.
  blur: probability of a Gaussian blur, whose sigma is uniform in blur_sigma, pixels.
  solarise: probability that the levels from 128 on are inverted.
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
  saturation: float = 0.0
  hue: float = 0.0
  jitter: float = 1.0
  shuffle: bool = False
  grey: float = 0.0
  solarise: float = 0.0
  interpolation: str = "bilinear"
  size: int | None = None

  def __post_init__(self):
    check_normalisation(self.mean, self.std)
    one_of(self.interpolation, FILTERS, where="interpolation")
    for name in _SHARES:
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name} must be from 0 to 1, found {getattr(self, name)}")
    if not 0 <= self.hue <= 0.5:
      raise ValueError(f"hue is a fraction of the colour circle, 0 to 0.5; found {self.hue}")
    for name in ("crop_scale", "crop_ratio", "blur_sigma"):
      pair = getattr(self, name)
      if len(pair) != 2 or not 0 < pair[0] <= pair[1] < math.inf:
        raise ValueError(f"{name} must be (low, high) with 0 < low <= high, found {pair}")
    if self.crop_scale[1] > 1:
      raise ValueError(f"crop_scale is a fraction of the image, at most 1; found {self.crop_scale}")
    if self.size is not None and self.size < 1:
      raise ValueError(f"size must be at least 1 pixel, found {self.size}")
    coloured = [name for name in ("saturation", "hue", "grey") if getattr(self, name)]
    if coloured and len(self.mean) != 3:
      raise ValueError(f"{coloured} need images of 3 channels, found {len(self.mean)}; set them 0")

  def __call__(self, keys: jax.Array, images: jax.Array) -> jax.Array:
    """Augments and normalises.

    Args:
      keys: one a sample, [b] (or raw, u32[b 2]).
      images: u8[b h w c].

    Returns:
      f32[b h w c], or f32[b size size c].
    """
    self._check(images)
    chex.assert_equal_shape_prefix([keys, images], 1)
    images = jax.vmap(self._one)(keys, images.astype(jnp.float32) / 255)
    return _normalise(images, self.mean, self.std)

  def clean(self, images: jax.Array) -> jax.Array:
    """Only normalises: u8[b h w c] -> f32[b h w c]."""
    self._check(images)
    return normalise(images, mean=self.mean, std=self.std)

  def pixels(self, images: jax.Array) -> jax.Array:
    """The inverse of `clean`, cut to the range of pixels: f32[b h w c] -> the same, in [0, 1]."""
    mean, std = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
    return jnp.clip(images * std + mean, 0, 1)

  def _one(self, key: jax.Array, image: jax.Array) -> jax.Array:
    """One image, f32[h w c] in [0, 1]."""
    image = self._crop(key, image)
    if self.flip:
      flipped = jax.random.bernoulli(jax.random.fold_in(key, _FLIP), self.flip)
      image = jnp.where(flipped, image[:, ::-1], image)
    image = self._jitter(key, image)
    if self.grey:
      chosen = jax.random.bernoulli(jax.random.fold_in(key, _GREY), self.grey)
      image = jnp.where(chosen, colour.grey(image), image)
    if self.blur:
      image = self._maybe_blur(jax.random.fold_in(key, _BLUR), image)
    if self.solarise:
      chosen = jax.random.bernoulli(jax.random.fold_in(key, _SOLARISE), self.solarise)
      image = jnp.where(chosen, colour.solarise(image), image)
    return image

  def _crop(self, key: jax.Array, image: jax.Array) -> jax.Array:
    height, width, _ = image.shape
    size = (self.size or height, self.size or width)
    if self.crop_scale == (1.0, 1.0) and size == (height, width):
      return image
    box = self._box(jax.random.fold_in(key, _CROP), height, width)
    out = crop_resize(image, box, height=size[0], width=size[1], interpolation=self.interpolation)
    return out if self.interpolation == "bilinear" else jnp.clip(out, 0, 1)  # it overshoots

  def _jitter(self, key: jax.Array, image: jax.Array) -> jax.Array:
    """Brightness, contrast, saturation and hue, as many of them as are on."""
    operations = {
      _BRIGHTNESS: (colour.brightness, 1.0, self.brightness),
      _CONTRAST: (colour.contrast, 1.0, self.contrast),
      _SATURATION: (colour.saturation, 1.0, self.saturation),
      _HUE: (colour.hue, 0.0, self.hue),
    }
    steps = []
    for number, (operation, centre, change) in operations.items():
      low, high = centre - change, centre + change
      if change:
        amount = jax.random.uniform(jax.random.fold_in(key, number), minval=low, maxval=high)
        steps.append(functools.partial(_apply, operation, amount))
    if not steps:
      return image
    jittered = image
    order = range(len(steps))
    if self.shuffle:
      ranks = jax.random.uniform(jax.random.fold_in(key, _ORDER), (len(operations),))
      on = [i for i, (_, _, change) in enumerate(operations.values()) if change]
      order = jnp.argsort(ranks[jnp.array(on)])
    for i in order:
      jittered = jax.lax.switch(i, steps, jittered) if self.shuffle else steps[i](jittered)
    if self.jitter == 1:
      return jittered
    chosen = jax.random.bernoulli(jax.random.fold_in(key, _JITTER), self.jitter)
    return jnp.where(chosen, jittered, image)

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


def _apply(operation, amount, image):
  return operation(image, amount)
