"""Decoding by libjpeg-turbo to planes, which are resized before they become RGB.

Most JPEGs store colour (Cb, Cr) at a quarter of the pixels of brightness (Y). OpenCV, as Pillow,
brings it to full size and turns all pixels to RGB; here each plane is cut and resized as stored,
and only the result is turned to RGB, so that less is computed and less resized. The smoother
interpolation of colour that libjpeg does in between is left out.

Takes whole 8-bit colour JPEGs of the usual kinds, where the crop needs them at full size; all else
is left to `jepax.data.opencv`. (At a half, libjpeg can do better than planes at a half: it decodes
colour at as many pixels as brightness.)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from jepax.data import opencv
from jepax.data.decode import Encoded

if TYPE_CHECKING:
  from turbojpeg import TurboJPEG

_FAILED = (OSError, ValueError, KeyError, UserWarning)  # on what is damaged or of no kind it knows
_YCBCR = 1  # libjpeg-turbo's TJCS_YCbCr
# Rows and columns of the image to one of Cb and Cr, by its TJSAMP_444, _422, _420, _440 and _411.
_SAMPLINGS = {0: (1, 1), 1: (1, 2), 2: (2, 2), 4: (2, 1), 5: (1, 4)}


def require() -> TurboJPEG:
  """Returns a decoder, for any number of threads; raises ValueError where something is missing."""
  opencv.require()
  other = "or set data.decoder='opencv'"
  try:
    import turbojpeg  # an optional dependency
  except ImportError as error:
    raise ValueError(
      f"data.decoder='turbojpeg' needs PyTurboJPEG ({error}): pip install 'jepax[turbojpeg]', "
      f"{other}"
    ) from error
  try:
    return _opened(turbojpeg.TurboJPEG)
  except (RuntimeError, OSError, AttributeError) as error:
    reason = str(error).partition("\n")[0]
    if "libjpeg-turbo 3" in reason:  # PyTurboJPEG 2 found libjpeg-turbo 2
      raise ValueError(
        f"data.decoder='turbojpeg': {reason} The library found is older: pip install "
        f"'PyTurboJPEG<2', which takes both, {other}"
      ) from error
    raise ValueError(
      f"data.decoder='turbojpeg' needs the library libturbojpeg ({reason}): apt install "
      f"libturbojpeg0 (Debian), apt install libturbojpeg (Ubuntu) or brew install jpeg-turbo, "
      f"{other}"
    ) from error


@functools.cache
def _opened(kind: type[TurboJPEG]) -> TurboJPEG:
  # It warns where libjpeg-turbo fills in what is damaged, or gave up: no pixels to go on with.
  warnings.filterwarnings("error", category=UserWarning, module=r"turbojpeg\Z")
  return kind()


@dataclasses.dataclass(frozen=True)
class Picture(opencv.Picture):
  """An image whose pixels are decoded when it is known which are wanted.

  factors: rows and columns of the image to one of Cb and Cr; None where OpenCV is to decode.
  """

  factors: tuple[int, int] | None = None

  @classmethod
  def of(cls, image: np.ndarray | Encoded) -> Picture:
    """Reads the header of an encoded image; raises BadExample where it can't be read."""
    if isinstance(image, np.ndarray) or image.channels == 1:  # OpenCV decodes Y alone as well
      return super().of(image)
    data, factors = image.read(), None
    try:
      width, height, sampling, space = require().decode_header(data)
      factors = _SAMPLINGS.get(sampling) if space == _YCBCR else None
      whole = data.endswith(opencv.END) and width * height <= (Image.MAX_IMAGE_PIXELS or math.inf)
      if factors and whole and not _has_notes(data):
        return cls(height, width, data, image.channels, image.name, factors=factors)
    except _FAILED:
      pass  # Pillow reads it, or says why not
    found = super().of(dataclasses.replace(image, file=data))
    return dataclasses.replace(found, factors=factors)

  def _cut(
    self, box: tuple[int, int, int, int], size: tuple[int, int], reduction: int, interpolation: str
  ) -> np.ndarray | None:
    if self.factors is None or reduction > 1:
      return super()._cut(box, size, reduction, interpolation)
    try:
      planes = require().decode_to_yuv_planes(self.source)
    except _FAILED:
      return super()._cut(box, size, reduction, interpolation)
    top, left, height, width = box
    y, cb, cr = (
      opencv.resize(
        plane[..., None],
        size,
        interpolation=interpolation,
        box=(top / down, left / across, height / down, width / across),
      )
      for plane, (down, across) in zip(planes, ((1, 1), self.factors, self.factors), strict=True)
    )
    cv2 = opencv.require()
    return cv2.cvtColor(cv2.merge([y, cr, cb]), cv2.COLOR_YCrCb2RGB)


def _has_notes(data: bytes) -> bool:
  """Whether a JPEG may hold EXIF or XMP, which say how to turn it; Pillow is to read those."""
  start = 2  # after the two bytes that begin the file
  while data[start : start + 1] == b"\xff":
    kind = data[start + 1 : start + 2]
    if kind == b"\xda":  # the pixels begin
      return False
    if kind == b"\xe1":  # the segment of both
      return True
    start += 2 + int.from_bytes(data[start + 2 : start + 4])
  return True  # bytes between segments: rare, and not for here
