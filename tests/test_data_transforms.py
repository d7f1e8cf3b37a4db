"""Host transforms against slow forms of torchvision's rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from jepax.data.transforms import CenterCrop, RandomResizedCrop

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (37, 52, 3), dtype=np.uint8)


def test_the_largest_crop_of_a_square_is_a_plain_resize():
  image = COLOUR[:, :37]
  crop = RandomResizedCrop(size=16, scale=(1.0, 1.0), ratio=(1.0, 1.0))
  expected = Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(crop(image, np.random.default_rng(0)), np.asarray(expected))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_random_crop_is_crop_then_resize(interpolation):
  transform = RandomResizedCrop(size=16, scale=(0.2, 0.6), interpolation=interpolation)
  top, left, h, w = transform.box(37, 52, np.random.default_rng(5))
  expected = (
    Image.fromarray(COLOUR)
    .crop((left, top, left + w, top + h))
    .resize((16, 16), Image.Resampling[interpolation.upper()])
  )
  found = transform(COLOUR, np.random.default_rng(5))
  np.testing.assert_array_equal(found, np.asarray(expected))


def test_boxes_follow_the_rule():
  transform, rng = RandomResizedCrop(size=8, scale=(0.3, 1.0)), np.random.default_rng(0)
  boxes = np.array([transform.box(100, 120, rng) for _ in range(4000)])
  top, left, h, w = boxes.T
  assert (boxes >= 0).all() and (top + h <= 100).all() and (left + w <= 120).all()
  area = h * w / (100 * 120)
  assert area.min() > 0.29 and area.max() > 0.95  # .01 for the rounding of sides to pixels
  assert (w / h).min() > 0.74 and (w / h).max() < 1.35
  small = area < 0.5  # crops that fit at every ratio: log-uniform, so symmetric in log
  spread = math.log(4 / 3) / math.sqrt(3)
  assert abs(np.log(w / h)[small].mean()) < 5 * spread / math.sqrt(small.sum())  # 5 sigma


@pytest.mark.parametrize(
  "height, width, expected",
  [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (50, 50, (0, 0, 50, 50))],
)
def test_fallback_is_the_largest_centre_crop(height, width, expected):
  # A crop of four times the image never fits, so all 10 tries fail.
  transform = RandomResizedCrop(size=8, scale=(4.0, 4.0))
  assert transform.box(height, width, np.random.default_rng(0)) == expected


@pytest.mark.parametrize("shape", [(37, 52), (52, 37), (40, 40), (9, 11), (300, 7)])
@pytest.mark.parametrize("resize", [1.0, 256 / 224])
def test_centre_crop_is_resize_then_crop(shape, resize):
  image, size = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8), 28
  short = round(size * resize)
  h, w = shape
  new = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
  whole = np.asarray(Image.fromarray(image).resize(new, Image.Resampling.BILINEAR))
  top, left = round((whole.shape[0] - size) / 2), round((whole.shape[1] - size) / 2)
  expected = whole[top : top + size, left : left + size]
  found = CenterCrop(size, resize)(image, np.random.default_rng(0))
  # One level: Pillow holds the corners of a box as float32, so a rounding may fall otherwise.
  assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("transform", [CenterCrop(12), RandomResizedCrop(size=12)])
def test_grey_keeps_its_channel_axis(transform):
  grey = COLOUR[..., :1]
  out = transform(grey, np.random.default_rng(0))
  assert (out.shape, out.dtype) == ((12, 12, 1), np.uint8)
  tripled = transform(np.repeat(grey, 3, -1), np.random.default_rng(0))
  np.testing.assert_array_equal(tripled, np.repeat(out, 3, -1))


def test_an_image_of_the_right_size_stays():
  np.testing.assert_array_equal(CenterCrop(30)(COLOUR[:30, :30], RNG), COLOUR[:30, :30])
