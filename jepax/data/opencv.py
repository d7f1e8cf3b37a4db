"""Decoding and resizing by OpenCV: faster than by Pillow, to pixels that differ a little.

OpenCV decodes the 8-bit grey and colour JPEGs that are whole; every other file goes through
`decode.decode`, so that damage, transparency, palettes, CMYK and 16 bits have one treatment. A JPEG
is decoded at a half, a quarter or an eighth (in the DCT, at a fraction of the cost) where the crop
still has at least the pixels that are wanted of it; and down to the end of the crop alone, where
its pixels are stored from top to bottom (those of a progressive JPEG, or with restarts, are not).
Damage below the crop goes unseen.

OpenCV's own linear and cubic interpolation do not antialias, and its area interpolation costs more
than decoding; `resize` smooths just enough before it interpolates. Crops of 500x375 photos to 224,
measured once on one busy core: 0.25 ms in this way, 0.77 by area, 0.12 by linear interpolation
alone, 1.0 by Pillow; rms difference to Pillow's pixels, of 255: 1.2, 1.5 and 3.2.
"""

from __future__ import annotations

import dataclasses
import io
import math
from types import ModuleType

import numpy as np
from PIL import ExifTags, Image

from jepax.data import jpeg
from jepax.data.decode import UNREADABLE, BadExample, Encoded, decode

_REDUCTIONS = (8, 4, 2)
_SMOOTHED = math.sqrt(5)  # three weights smooth enough for this factor: they are equal there
# What turns the stored pixels upright, by EXIF orientation: the axes that OpenCV flips (0 rows,
# 1 columns, -1 both), after rows and columns have changed places from 5 on.
_FLIPS = {1: None, 2: 1, 3: -1, 4: 0, 5: None, 6: 1, 7: -1, 8: 0}
_TRANSPOSED = 5


def require() -> ModuleType:
  """Returns cv2, held to one thread a call; raises ValueError where it is not installed."""
  try:
    import cv2  # an optional dependency
  except ImportError as error:
    raise ValueError(
      f"data.decoder, where it is not 'pillow', needs OpenCV ({error}): pip install "
      "'jepax[opencv]', or set data.decoder='pillow'"
    ) from error
  cv2.setNumThreads(0)  # the loader has threads already, one a batch
  return cv2


@dataclasses.dataclass(frozen=True)
class Picture:
  """An image whose pixels are decoded when it is known which are wanted.

  height, width: upright, pixels.
  source: u8[h w c], or the bytes of a whole 8-bit JPEG.
  channels: 1 or 3. name: for errors. orientation: EXIF's, of `source`.
  header: of `source`, where it is a JPEG of the usual kinds.
  """

  height: int
  width: int
  source: np.ndarray | bytes
  channels: int
  name: str
  orientation: int = 1
  header: jpeg.Header | None = None

  @classmethod
  def of(cls, image: np.ndarray | Encoded) -> Picture:
    """Reads the header of an encoded image; raises BadExample where it can't be read."""
    if isinstance(image, np.ndarray):
      return cls(*image.shape[:2], image, image.shape[-1], "array")
    data = image.read()
    header, most = jpeg.read(data), Image.MAX_IMAGE_PIXELS or math.inf
    if header is not None and not header.notes and header.height * header.width <= most:
      size = (header.height, header.width)
      return cls(*size, data, image.channels, image.name, header=header)
    try:
      with Image.open(io.BytesIO(data)) as file:
        plain = file.format == "JPEG" and file.mode in ("L", "RGB") and data.endswith(jpeg.END)
        orientation = file.getexif().get(ExifTags.Base.Orientation, 1) if plain else 1
        width, height = file.size
    except UNREADABLE as error:
      raise BadExample(f"{image.name}: {type(error).__name__}: {error}") from error
    if not plain:
      pixels = decode(data, channels=image.channels, name=image.name)
      return cls(*pixels.shape[:2], pixels, image.channels, image.name)
    if orientation not in _FLIPS:
      orientation = 1  # as Pillow does with tags that mean nothing
    if orientation >= _TRANSPOSED:
      height, width = width, height
    return cls(height, width, data, image.channels, image.name, orientation, header)

  def resized(
    self, box: tuple[int, int, int, int], size: tuple[int, int], *, interpolation: str
  ) -> np.ndarray:
    """The pixels of a box, resized with antialiasing.

    Args:
      box: (top, left, height, width), pixels of the whole upright image.
      size: (height, width) of the result, pixels.
      interpolation: as of `resize`.

    Returns:
      u8[*size channels].

    Raises:
      BadExample: the file can't be decoded.
    """
    pixels = None
    if isinstance(self.source, bytes):
      smallest = min(box[2] / size[0], box[3] / size[1])
      reduction = next((r for r in _REDUCTIONS if r <= smallest), 1)
      stored = size[::-1] if self.orientation >= _TRANSPOSED else size
      pixels = self._cut(self._stored(box), stored, reduction, interpolation)
    if pixels is not None:
      return self._upright(pixels)
    pixels = self.source
    if isinstance(pixels, bytes):  # Pillow takes it, or says why not
      pixels = decode(pixels, channels=self.channels, name=self.name)
    return np.ascontiguousarray(resize(pixels, size, interpolation=interpolation, box=box))

  def _stored(self, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """A box of the upright image in the pixels as they are stored."""
    top, left, height, width = box
    flip = _FLIPS[self.orientation]
    if flip in (0, -1):
      top = self.height - top - height
    if flip in (1, -1):
      left = self.width - left - width
    if self.orientation >= _TRANSPOSED:
      return left, top, width, height
    return top, left, height, width

  def _upright(self, pixels: np.ndarray) -> np.ndarray:
    """Turns stored pixels; by OpenCV, which takes a tenth of NumPy's time."""
    cv2, flip = require(), _FLIPS[self.orientation]
    if self.orientation >= _TRANSPOSED:
      pixels = cv2.transpose(pixels)
    if flip is not None:
      pixels = cv2.flip(pixels, flip)
    return np.ascontiguousarray(pixels).reshape(*pixels.shape[:2], self.channels)

  def _cut(
    self, box: tuple[int, int, int, int], size: tuple[int, int], reduction: int, interpolation: str
  ) -> np.ndarray | None:
    """A resized box of the pixels as a JPEG stores them; None where OpenCV can't decode it."""
    cv2 = require()
    flags = cv2.IMREAD_COLOR_RGB if self.channels == 3 else cv2.IMREAD_GRAYSCALE
    if reduction > 1:
      flags |= getattr(cv2, f"IMREAD_REDUCED_GRAYSCALE_{reduction}")
    flags |= cv2.IMREAD_IGNORE_ORIENTATION
    for data in self._shortest_first(box, reduction):
      pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
      if pixels is not None:
        break
    else:
      return None
    pixels = pixels.reshape(*pixels.shape[:2], self.channels)
    reduced = tuple(n / reduction for n in box)
    return resize(pixels, size, interpolation=interpolation, box=reduced)

  def _shortest_first(self, box: tuple[int, int, int, int], reduction: int) -> list[bytes]:
    """The file with the rows down to the end of a box alone, if that can be had; the whole file.

    OpenCV prints what libjpeg complains of. Without an end it finds no marker to complain at, and
    gives up what is below the rows in silence; but where the data end within them, it returns None.
    """
    header = self.header
    if header is None:
      return [self.source]
    below = header.unit[0] // jpeg.BLOCK - 1  # libjpeg interpolates Cb and Cr with rows below
    rows = (-(-(box[0] + box[2]) // reduction) + below) * reduction
    if header.needs_all(rows) or not header.ends_once(self.source):
      return [self.source]
    return [header.sized(self.source, rows, header.width, end=b""), self.source]


def resize(
  image: np.ndarray,
  size: tuple[int, int],
  *,
  interpolation: str,
  box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
  """Resizes by OpenCV, with antialiasing.

  An axis that shrinks by up to the root of 5 is smoothed over three pixels, as much as widens the
  kernel of linear interpolation to the one that antialiasing asks for, and then interpolated. One
  that shrinks by more is brought to a multiple of its size in this way, and averaged over blocks.

  Args:
    image: u8[h w c], c 1 or 3.
    size: (height, width) of the result, pixels.
    interpolation: 'bilinear', 'bicubic' or 'area' (which repeats pixels where an axis grows).
    box: (top, left, height, width), the part that is resized, in pixels and parts of them; what
      lies outside of the pixels that it touches has no weight. All by default.

  Returns:
    u8[*size c].
  """
  cv2 = require()
  methods = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}
  channels, box = image.shape[-1], box or (0, 0, *image.shape[:2])
  rows, down, height, fy = _axis(box[0], box[2], size[0])
  columns, across, width, fx = _axis(box[1], box[3], size[1])
  image = image[rows, columns]
  if down or across:
    image = _shifted(image, down, across)
  if interpolation != "area" and (fy < 1 or fx < 1):
    weights = (_weights(fx, across), _weights(fy, down))
    image = cv2.sepFilter2D(image, -1, *weights, borderType=cv2.BORDER_REPLICATE)
  if fy != 1 or fx != 1:  # by factors rather than to a size, as the box may end within a pixel
    image = cv2.resize(image, None, fx=fx, fy=fy, interpolation=methods[interpolation])
  image = image[:height, :width]
  if (height, width) != size:
    image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
  return image.reshape(*size, channels)


def _axis(start: float, length: float, size: int) -> tuple[slice, float, int, float]:
  """Of one axis: the pixels that are touched, how far into the first the box begins, the size
  before the averaging over blocks, and the factor to it."""
  fine = size * max(1, math.ceil(length / (_SMOOTHED * size)))
  return slice(math.floor(start), math.ceil(start + length)), start % 1, fine, fine / length


def _shifted(image: np.ndarray, down: float, across: float) -> np.ndarray:
  """The image as sampled a part of a pixel further down and to the right, of the same size."""
  cv2 = require()
  border = (0, math.ceil(down), 0, math.ceil(across))
  image = cv2.copyMakeBorder(image, *border, cv2.BORDER_REPLICATE)
  if down > 0:
    image = cv2.addWeighted(image[:-1], 1 - down, image[1:], down, 0)
  if across > 0:
    image = cv2.addWeighted(image[:, :-1], 1 - across, image[:, 1:], across, 0)
  return image


def _weights(factor: float, shift: float) -> np.ndarray:
  """Of three pixels, f64[3]: what smooths an axis resized by a factor, given its shift.

  Triangles half as wide as s pixels and as 1 have the variances s^2 / 6 and 1 / 6, so the weights
  (a, 1 - 2a, a), of variance 2a, make up the difference, less what shifting has smoothed.
  """
  a = max(0.0, (factor**-2 - 1) / 12 - shift * (1 - shift) / 2)
  return np.array([a, 1 - 2 * a, a])
