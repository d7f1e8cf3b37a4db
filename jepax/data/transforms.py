"""Host transforms: one image of any size to u8[size size c], resized with antialiasing.

decoder='pillow' gives the pixels torchvision gives on PIL images. Images are decoded at full size:
decoding JPEGs at a half or a quarter (Pillow's `draft`) and shrinking in two steps (`reducing_gap`)
are quicker, but change pixels, and released models were trained without.

decoder='opencv' and 'turbojpeg' draw the same crops and are faster; what they do, and by how much
their pixels differ, stands in `jepax.data.opencv` and `jepax.data.turbojpeg`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np
from PIL import Image

from jepax.data import opencv, turbojpeg
from jepax.data.decode import Encoded

FAST = {"opencv": opencv, "turbojpeg": turbojpeg}  # by decoder, its Picture and require()
DECODERS = ("pillow", *FAST)
INTERPOLATIONS = {
  "bilinear": Image.Resampling.BILINEAR,
  "bicubic": Image.Resampling.BICUBIC,
  "area": Image.Resampling.BOX,
}


class Transform(Protocol):
  """u8[h w c] to u8[size size c]; all randomness comes from rng."""

  def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray: ...


def decodes(transform: Transform | None) -> bool:
  """Whether a transform also takes images that are not decoded yet, and is faster on them."""
  ours = isinstance(transform, RandomResizedCrop | CenterCrop)
  return ours and transform.decoder in FAST


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
  """A crop of random area and aspect, resized to a square.

  size: pixels of the square's side.
  scale: range of the crop's area, fraction of the image.
  ratio: range of width / height, log-uniform.
  interpolation: 'bilinear' or 'bicubic'.
  decoder: 'pillow', as torchvision; or a key of FAST, which also take what is not decoded yet.
  Source: torchvision.transforms.RandomResizedCrop (10 tries, then the largest centre crop).
  """

  size: int
  scale: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  interpolation: str = "bilinear"
  decoder: str = "pillow"

  def __call__(self, image: np.ndarray | Encoded, rng: np.random.Generator) -> np.ndarray:
    size = (self.size, self.size)
    if self.decoder in FAST:
      picture = FAST[self.decoder].Picture.of(image)
      box = self.box(picture.height, picture.width, rng)
      return picture.resized(box, size, interpolation=self.interpolation)
    top, left, height, width = self.box(*image.shape[:2], rng)
    # Cut before resizing: with resize(box=...) pixels outside the crop bleed into its border.
    crop = image[top : top + height, left : left + width]
    return resize(crop, size, interpolation=self.interpolation)

  def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws a crop (top, left, height, width) of an image of this height and width, pixels."""
    for _ in range(10):
      area = height * width * rng.uniform(*self.scale)
      aspect = math.exp(rng.uniform(*np.log(self.ratio)))
      w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
      if 0 < w <= width and 0 < h <= height:
        return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


@dataclasses.dataclass(frozen=True)
class CenterCrop:
  """Resizes the shorter side to round(size * resize) pixels and cuts the middle square.

  size: pixels of the square's side.
  resize: at least 1; 256/224 is the common choice of evaluation, 1 the largest square.
  interpolation: 'bilinear' or 'bicubic'.
  decoder: 'pillow', as torchvision; or a key of FAST, which also take what is not decoded yet.
  Source: torchvision.transforms.Resize and CenterCrop.
  """

  size: int
  resize: float = 1.0
  interpolation: str = "bilinear"
  decoder: str = "pillow"

  def __call__(self, image: np.ndarray | Encoded, rng: np.random.Generator) -> np.ndarray:
    del rng
    if self.decoder in FAST:
      return self._cut(FAST[self.decoder].Picture.of(image))
    height, width = image.shape[:2]
    new_height, new_width = self._whole(height, width)
    # The square in pixels of the source: the same numbers as resizing all and then cutting.
    x, y = width / new_width, height / new_height
    left, top = round((new_width - self.size) / 2), round((new_height - self.size) / 2)
    box = (left * x, top * y, (left + self.size) * x, (top + self.size) * y)
    return resize(image, (self.size, self.size), interpolation=self.interpolation, box=box)

  def _cut(self, picture: opencv.Picture) -> np.ndarray:
    box = (0, 0, picture.height, picture.width)
    new = self._whole(picture.height, picture.width)
    whole = picture.resized(box, new, interpolation=self.interpolation)
    top, left = (round((n - self.size) / 2) for n in new)
    return np.ascontiguousarray(whole[top : top + self.size, left : left + self.size])

  def _whole(self, height: int, width: int) -> tuple[int, int]:
    """The size that the whole image is resized to."""
    short = round(self.size * self.resize)
    return max(short, short * height // width), max(short, short * width // height)


def resize(
  image: np.ndarray,
  size: tuple[int, int],
  *,
  interpolation: str,
  box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
  """Resizes by Pillow, with antialiasing.

  Args:
    image: u8[h w c], c 1 or 3.
    size: (height, width) of the result, pixels.
    interpolation: a key of INTERPOLATIONS.
    box: (left, top, right, bottom), the part of the image that is resized; all by default.

  Returns:
    u8[*size c].
  """
  if image.shape[:2] == size and box is None:
    return image
  grey = image.shape[-1] == 1
  pixels = Image.fromarray(np.ascontiguousarray(image[..., 0] if grey else image))
  out = pixels.resize(size[::-1], INTERPOLATIONS[interpolation], box=box)
  return np.asarray(out).reshape(*size, image.shape[-1])
