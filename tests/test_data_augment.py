"""Device augmentation against Pillow and numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from jepax.data.augment import Augment, crop_resize, gaussian_blur

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 14, 14, 3), dtype=np.uint8)
PIXELS = IMAGES.astype(np.float32) / 255
KEYS = jax.random.split(jax.random.key(0), 6)
UNIT = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
ALL_ON = Augment(**UNIT, crop_scale=(0.3, 1.0), flip=0.5, brightness=0.4, contrast=0.4, blur=0.5)
ROUNDING = 1e-5  # float32 rounding of sums over 14 pixels of at most 1


@functools.cache
def jitted(augment):
  return jax.jit(augment.__call__)


@pytest.mark.parametrize("box", [(0, 0, 20, 30), (3, 4, 15, 28), (2.3, 7.9, 9.1, 13.4)])
@pytest.mark.parametrize("size", [(12, 16), (33, 8)])
def test_crop_resize_equals_pillow(box, size):
  image = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
  top, left, bottom, right = box
  expected = Image.fromarray(image).resize(
    size[::-1], Image.Resampling.BILINEAR, box=(left, top, right, bottom)
  )
  found = crop_resize(
    jnp.array(image, jnp.float32), jnp.array(box, jnp.float32), height=size[0], width=size[1]
  )
  # Pillow rounds to whole levels after each of its two passes: 1.5 levels at most.
  np.testing.assert_allclose(found, np.asarray(expected, np.float32), atol=1.5)


def test_blur_equals_a_slow_gaussian():
  image, sigma = PIXELS[0], 1.3
  weights = np.array(
    [[np.exp(-((i - j) ** 2) / (2 * sigma**2)) for j in range(14)] for i in range(14)]
  )
  weights /= weights.sum(1, keepdims=True)
  expected = np.zeros_like(image)
  for y in range(14):
    for x in range(14):
      expected[y, x] = np.einsum("h,w,hwc->c", weights[y], weights[x], image)
  np.testing.assert_allclose(gaussian_blur(jnp.array(image), sigma), expected, atol=ROUNDING)


def test_blur_equals_pillow_inside():
  big = RNG.integers(0, 256, (40, 40), dtype=np.uint8)
  kernel = np.exp(-0.5 * (np.arange(-12, 13) / 2.0) ** 2)
  kernel /= kernel.sum()
  rows = np.apply_along_axis(np.convolve, 0, big.astype(np.float64), kernel, "same")
  expected = np.apply_along_axis(np.convolve, 1, rows, kernel, "same")[13:-13, 13:-13]
  found = gaussian_blur(jnp.array(big, jnp.float32)[..., None], 2.0)[13:-13, 13:-13, 0]
  # The reference cuts the tails past 6 sigma: less than 1e-8 of the weight.
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_all_off_only_normalises():
  augment = Augment(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
  clean = augment.clean(IMAGES)
  np.testing.assert_array_equal(augment(KEYS, IMAGES), clean)
  expected = (IMAGES / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
  np.testing.assert_allclose(clean, expected, atol=ROUNDING)
  assert clean.dtype == jnp.float32


def test_operations_that_are_off_are_not_traced():
  augment = Augment(**UNIT)
  assert "random" not in str(jax.make_jaxpr(augment)(KEYS, IMAGES))
  assert "random" in str(jax.make_jaxpr(ALL_ON)(KEYS, IMAGES))


def test_same_key_same_result_wherever_it_stands():
  out = np.asarray(jitted(ALL_ON)(KEYS, IMAGES))
  np.testing.assert_array_equal(out, jitted(ALL_ON)(KEYS, IMAGES))
  order = np.array([3, 0, 5, 1, 4, 2])
  moved = jitted(ALL_ON)(KEYS[order], IMAGES[order])
  np.testing.assert_allclose(moved, out[order], atol=ROUNDING)
  other = jitted(ALL_ON)(jax.random.split(jax.random.key(1), 6), IMAGES)
  assert (np.abs(np.asarray(other) - out).max((1, 2, 3)) > 0.01).all()


def test_pixels_stay_in_range_and_a_flat_image_stays_flat():
  out = np.asarray(jitted(ALL_ON)(KEYS, IMAGES))
  assert out.shape == IMAGES.shape and out.min() >= -ROUNDING and out.max() <= 1 + ROUNDING
  flat = np.full_like(IMAGES, 100)
  assert np.ptp(np.asarray(jitted(ALL_ON)(KEYS, flat)), (1, 2, 3)).max() < ROUNDING


def test_flip_is_all_or_nothing():
  keys = jax.random.split(jax.random.key(2), 400)
  image = jnp.arange(2, dtype=jnp.uint8).reshape(1, 1, 2, 1).repeat(400, 0)
  augment = Augment(mean=(0.0,), std=(1.0,), flip=0.3)
  flipped = np.asarray(jitted(augment)(keys, image))[:, 0, 0, 0] > 0
  assert abs(flipped.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 400)  # 4 sigma
  always = Augment(**UNIT, flip=1.0)(KEYS, IMAGES)
  np.testing.assert_array_equal(always, Augment(**UNIT).clean(IMAGES)[:, :, ::-1])


@pytest.mark.parametrize(
  "name, enhancer", [("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast)]
)
def test_colour_equals_pillow_at_some_factor_in_range(name, enhancer):
  out = np.asarray(Augment(**UNIT, **{name: 0.5})(KEYS, IMAGES)) * 255
  factors = []
  for image, found in zip(IMAGES, out, strict=True):
    candidates = np.linspace(0.5, 1.5, 1001)
    pillow = enhancer(Image.fromarray(image))
    errors = [np.abs(np.asarray(pillow.enhance(f), float) - found).max() for f in candidates]
    # Pillow rounds pixels and the mean grey to whole levels, and the factors are .001 apart.
    assert min(errors) < 2
    factors.append(candidates[np.argmin(errors)])
  assert np.ptp(factors) > 0.1


def test_crop_boxes_keep_to_their_ranges():
  augment = Augment(**UNIT, crop_scale=(0.3, 0.5))
  keys = jax.random.split(jax.random.key(3), 2000)
  top, left, bottom, right = np.asarray(
    jax.jit(jax.vmap(lambda k: augment._box(k, 20, 30)))(keys)
  ).T
  h, w = bottom - top, right - left
  assert min(top.min(), left.min()) >= 0
  assert bottom.max() <= 20 + ROUNDING and right.max() <= 30 + ROUNDING
  area = h * w / 600
  assert 0.3 - ROUNDING <= area.min() < 0.31 and 0.49 < area.max() <= 0.5 + ROUNDING
  assert (w / h).min() >= 0.75 - ROUNDING and (w / h).max() <= 4 / 3 + ROUNDING
  assert top.std() > 1 and left.std() > 1


def test_a_ramp_is_cropped_where_the_box_says():
  """Pixel values tell the place: the mean of a cropped ramp is the middle of its box."""
  ramp = np.tile(np.arange(0, 252, 9, dtype=np.uint8)[:, None], (1, 28))[None, ..., None]
  augment = Augment(mean=(0.0,), std=(1.0,), crop_scale=(0.2, 0.3), crop_ratio=(1.0, 1.0))
  key = jax.random.key(4)
  top, _, bottom, _ = jax.jit(lambda k: augment._box(k, 28, 28))(jax.random.fold_in(key, 0))
  found = np.asarray(jitted(augment)(key[None], ramp))[0].mean() * 255
  # Row y has the value 9 y and its centre at y + .5; half a row where the box touches the border.
  assert abs(found - 9 * ((top + bottom) / 2 - 0.5)) < 4.5


@pytest.mark.parametrize(
  "options, message",
  [
    ({"mean": (0.5, 0.5)}, "one number a channel"),
    ({"std": (1.0, 1.0, 0.0)}, "above 0"),
    ({"flip": 1.2}, "flip must be from 0 to 1, found 1.2"),
    ({"crop_scale": (0.5, 0.2)}, "low <= high"),
    ({"crop_scale": (0.5, 1.2)}, "at most 1"),
    ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
  ],
)
def test_wrong_settings(options, message):
  with pytest.raises(ValueError, match=message):
    Augment(**{**UNIT, **options})


def test_wrong_images():
  with pytest.raises(ValueError, match="1 channels, mean and std are given for 3"):
    Augment(**UNIT).clean(IMAGES[..., :1])
  with pytest.raises(AssertionError):
    Augment(**UNIT).clean(PIXELS)
