"""Colour operations, several views and their presets, against Pillow and colorsys."""

from __future__ import annotations

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from jepax.data import colour, views
from jepax.data.augment import Augment
from jepax.data.resample import crop_resize
from jepax.data.sources import embedded
from jepax.data.views import MultiCrop

UNIT = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
KEYS = jax.random.split(jax.random.key(0), 6)


def real() -> np.ndarray:
  """Six garments as the channels of two colour images, u8[28 28 3] each, and a gradient of hues."""
  grey = embedded("test").images[:6, ..., 0]
  hues = np.mgrid[0:28, 0:28, 0:1][:2, ..., 0] * 9
  painted = np.stack([hues[0], hues[1], 255 - hues[0]], -1).astype(np.uint8)
  return np.stack([grey[:3].transpose(1, 2, 0), grey[3:].transpose(1, 2, 0), painted])


def random() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)


PICTURES = np.concatenate([real(), random()])
PIXELS = jnp.asarray(PICTURES, jnp.float32) / 255


def levels(image: np.ndarray) -> np.ndarray:
  """f32[...] in [0, 1] -> whole levels, truncated as Pillow's blend does."""
  return np.floor(np.asarray(image, np.float64) * 255 + 1e-3)


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.4, 1.9])
@pytest.mark.parametrize(
  "operation, enhancer",
  [
    (colour.brightness, ImageEnhance.Brightness),
    (colour.contrast, ImageEnhance.Contrast),
    (colour.saturation, ImageEnhance.Color),
  ],
)
def test_enhancers_equal_pillow_within_one_level(operation, enhancer, factor):
  found = levels(jax.vmap(operation, in_axes=(0, None))(PIXELS, factor))
  expected = [np.asarray(enhancer(Image.fromarray(p)).enhance(factor)) for p in PICTURES]
  assert np.abs(found - np.array(expected, np.float64)).max() <= 1


def test_grey_equals_pillow_within_one_level():
  found = np.asarray(jax.vmap(colour.grey)(PIXELS)) * 255
  expected = [np.asarray(Image.fromarray(p).convert("L"))[..., None] for p in PICTURES]
  assert found.shape == PICTURES.shape
  assert np.abs(found - np.array(expected, np.float64)).max() <= 0.51  # rounded to the nearest


def test_solarise_equals_pillow_exactly():
  every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
  for picture in (every, *PICTURES[:2]):
    expected = np.asarray(ImageOps.solarize(Image.fromarray(picture), threshold=128))
    found = np.asarray(colour.solarise(jnp.asarray(picture, jnp.float32) / 255)) * 255
    np.testing.assert_allclose(found, expected, atol=1e-3)  # float32 rounding of 255


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.07, 0.5])
def test_hue_equals_colorsys(shift):
  found = np.asarray(jax.vmap(colour.hue, in_axes=(0, None))(PIXELS, shift))
  expected = []
  for rgb in PICTURES.reshape(-1, 3) / 255:
    h, s, v = colorsys.rgb_to_hsv(*rgb)
    expected.append(colorsys.hsv_to_rgb((h + shift) % 1, s, v))
  # A hue that is ill-defined, of a dark or nearly grey pixel, moves the pixel by as little.
  np.testing.assert_allclose(found.reshape(-1, 3), expected, atol=1e-5)


def test_hue_is_near_pillows_eight_bit_hsv():
  """The exception to one level: Pillow rounds hue, saturation and value to 8 bits on the way."""
  found = jax.vmap(colour.hue, in_axes=(0, None))(PIXELS, 25 / 255)
  errors = []
  for picture, ours in zip(PICTURES, np.asarray(found) * 255, strict=True):
    h, s, v = Image.fromarray(picture).convert("HSV").split()
    turned = ((np.asarray(h, int) + 25) % 256).astype(np.uint8)
    expected = Image.merge("HSV", (Image.fromarray(turned), s, v)).convert("RGB")
    errors.append(np.abs(ours - np.asarray(expected, float)))
  # A step of hue is 6 / 256 of the chroma, so up to 6 levels; truncation makes it 2 of them.
  assert np.max(errors) < 12 and np.mean(errors) < 3


@pytest.mark.parametrize("box", [(0, 0, 28, 28), (3, 4, 15, 26), (2.3, 7.9, 9.1, 23.4)])
def test_bicubic_equals_pillow(box):
  top, left, bottom, right = box
  pictures = real() // 2 + 64  # no overshoot leaves the range, or Pillow would clip between passes
  resize = functools.partial(crop_resize, height=12, width=20, interpolation="bicubic")
  inputs = jnp.asarray(pictures, jnp.float32), jnp.array(box, jnp.float32)
  found = jax.vmap(resize, in_axes=(0, None))(*inputs)
  for picture, ours in zip(pictures, found, strict=True):
    expected = Image.fromarray(picture).resize(
      (20, 12), Image.Resampling.BICUBIC, box=(left, top, right, bottom)
    )
    # Pillow rounds to whole levels after each of its two passes; the filter's weights, some below
    # zero, may enlarge the first half level by a quarter: 1.125 levels at most.
    np.testing.assert_allclose(ours, np.asarray(expected, np.float32), atol=1.13)


# --- what an augmentation draws -------------------------------------------------------------

OPTIONS = dict(
  crop_scale=(0.3, 1.0), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.3,
  blur=0.5, solarise=0.3, jitter=0.8, shuffle=True,
)  # fmt: skip


@functools.cache
def jitted(augment):
  return jax.jit(augment.__call__)


def test_draws_do_not_depend_on_what_else_is_on():
  """Taken off one by one from all that is on, an operation never moves the others' draws.

  Seen where it is exact: on images that an operation leaves as they are.
  """
  flat = np.full(
    (6, 8, 8, 3), 90, np.uint8
  )  # a flat grey image: crop, flip, blur and hue do nothing
  full = Augment(**UNIT, **OPTIONS)
  silent = dict(crop_scale=(1.0, 1.0), flip=0.0, blur=0.0, hue=0.0, saturation=0.0, grey=0.0)
  some = Augment(**UNIT, **{**OPTIONS, **silent, "shuffle": False})
  assert np.ptp(np.asarray(full(KEYS, flat))[:, 0, 0, 0]) > 0.1  # brightness differs by sample
  np.testing.assert_allclose(full(KEYS, flat), some(KEYS, flat), atol=1e-5)


def test_existing_draws_have_not_moved():
  """Numbers folded into the key are for ever: results of the first release, for one key."""
  augment = Augment(mean=(0.5,), std=(1.0,), crop_scale=(0.3, 1.0), flip=0.5, brightness=0.4,
                    contrast=0.4, blur=0.5)  # fmt: skip
  ramp = np.arange(0, 256, 4, dtype=np.uint8).reshape(1, 8, 8, 1)
  out = np.asarray(augment(jax.random.split(jax.random.key(3), 2), ramp.repeat(2, 0)))
  np.testing.assert_allclose(out[:, 0, 0, 0], (-0.2272680, -0.2433574), atol=1e-5)
  np.testing.assert_allclose(out[:, 5, 2, 0], (-0.0139956, 0.2438512), atol=1e-5)


def test_probabilities_of_the_new_operations():
  keys = jax.random.split(jax.random.key(2), 400)
  pixel = np.array([200, 40, 90], np.uint8).reshape(1, 1, 1, 3).repeat(400, 0)
  plain = Augment(**UNIT).clean(pixel[:1])
  for name, value in (("grey", 0.3), ("solarise", 0.3), ("jitter", 0.3)):
    options = {name: value, **(dict(brightness=0.4) if name == "jitter" else {})}
    out = np.asarray(jitted(Augment(**UNIT, **options))(keys, pixel))
    changed = (np.abs(out - np.asarray(plain)).max((1, 2, 3)) > 1e-6).mean()
    assert abs(changed - value) < 4 * np.sqrt(0.3 * 0.7 / 400)  # 4 sigma


def test_colour_jitter_is_applied_in_every_order():
  """Order shows: some results differ from those of the fixed one, and none by much."""
  picture = PICTURES[2:3].repeat(6, 0)
  options = dict(brightness=0.4, contrast=0.4, saturation=0.4)
  fixed = np.asarray(jitted(Augment(**UNIT, **options))(KEYS, picture))
  mixed = np.asarray(jitted(Augment(**UNIT, **options, shuffle=True))(KEYS, picture))
  differs = np.abs(fixed - mixed).max((1, 2, 3)) > 1e-4
  assert differs.any() and np.abs(fixed - mixed).mean() < 0.1


@pytest.mark.parametrize(
  "options, message",
  [
    ({"hue": 0.6}, "0 to 0.5; found 0.6"),
    ({"grey": -0.1}, "grey must be from 0 to 1"),
    ({"size": 0}, "at least 1 pixel"),
    ({"interpolation": "nearest"}, "interpolation='nearest' is unknown"),
    ({"mean": (0.5,), "std": (0.5,), "saturation": 0.2}, r"\['saturation'\] need images of 3"),
  ],
)
def test_wrong_settings(options, message):
  with pytest.raises(ValueError, match=message):
    Augment(**{**UNIT, **options})


# --- several views --------------------------------------------------------------------------


def test_multi_crop_is_its_augments_one_by_one():
  big = Augment(**UNIT, crop_scale=(0.3, 1.0), flip=0.5)
  small = Augment(**UNIT, crop_scale=(0.05, 0.3), size=12)
  crops = MultiCrop((big, big, small))
  keys = jax.random.split(jax.random.key(1), (3, 6))
  found = jax.jit(crops.__call__)(keys, PICTURES)
  assert [view.shape for view in found] == [(6, 28, 28, 3), (6, 28, 28, 3), (6, 12, 12, 3)]
  for view, augment, key in zip(found, crops.crops, keys, strict=True):
    np.testing.assert_allclose(view, jitted(augment)(key, PICTURES), atol=1e-5)
  assert np.abs(np.asarray(found[0]) - np.asarray(found[1])).max() > 0.1
  np.testing.assert_array_equal(crops.clean(PICTURES), big.clean(PICTURES))


def test_multi_crop_needs_one_normalisation():
  with pytest.raises(ValueError, match="one normalisation"):
    MultiCrop((Augment(**UNIT), Augment(mean=(0.1,) * 3, std=(1.0,) * 3)))


@pytest.mark.parametrize(
  "preset", [views.simclr, views.byol, views.simsiam, views.lejepa, views.dino]
)
def test_presets_are_valid(preset):
  sections = preset()
  base = sections["views"]
  for section in sections.values():
    Augment(**UNIT, **{**base, **section})
  assert base["jitter"] == 0.8 and base["grey"] == 0.2 and base["shuffle"]


def test_byols_two_views():
  sections = views.byol()
  second = {**sections["views"], **sections["second"]}
  assert (sections["views"]["blur"], second["blur"]) == (1.0, 0.1)
  assert ("solarise" in sections["views"], second["solarise"]) == (False, 0.2)
