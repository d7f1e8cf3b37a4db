"""Decoding by libjpeg-turbo to planes, which are resized before they become RGB.

Most JPEGs store colour (Cb, Cr) at a quarter of the pixels of brightness (Y). OpenCV, as Pillow,
brings it to full size and turns all pixels to RGB; here each plane is cut and resized as stored,
and only the result is turned to RGB, so that less is computed and less resized. The smoother
interpolation of colour that libjpeg does in between is left out.

Takes whole 8-bit colour JPEGs of the usual kinds, where the crop needs them at full size; all else
is left to `jepax.data.opencv`, whose way to leave out the rows below the crop is taken here too.
(At a half, libjpeg can do better than planes at a half: it decodes colour at as many pixels as
brightness.)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np

from jepax.data import jpeg, opencv

if TYPE_CHECKING:
  from turbojpeg import TurboJPEG

_FAILED = (OSError, ValueError, KeyError)  # on what is damaged or of no kind it knows
# A marker that means nothing, put behind the pixels where rows of them are left out: no other file
# has it, so libjpeg-turbo's complaint about what it skipped can't be of another thing.
_LAST, _SKIPPED = b"\xff\x01", " extraneous bytes before marker 0x01"


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
  decoder = kind()
  # It would only warn where libjpeg-turbo fills in what is damaged, or gave up.
  decoder._TurboJPEG__report_error = functools.partial(_report, decoder)
  return decoder


def _report(decoder: TurboJPEG, handle: int) -> None:
  """Raises OSError for what libjpeg-turbo complains of, unless that is that rows are left out."""
  message = decoder._TurboJPEG__get_error_string(handle)  # of the first complaint
  if not message.endswith(_SKIPPED):
    raise OSError(message)


@dataclasses.dataclass(frozen=True)
class Picture(opencv.Picture):
  """An image whose pixels are decoded when it is known which are wanted."""

  def _cut(
    self, box: tuple[int, int, int, int], size: tuple[int, int], reduction: int, interpolation: str
  ) -> np.ndarray | None:
    known = self.channels == 3 and self.header is not None and self.header.factors is not None
    planes = self._planes(box[0] + box[2]) if known and reduction == 1 else None
    if planes is None:
      return super()._cut(box, size, reduction, interpolation)
    top, left, height, width = box
    factors = self.header.factors
    y, cb, cr = (
      opencv.resize(
        plane[..., None],
        size,
        interpolation=interpolation,
        box=(top / down, left / across, height / down, width / across),
      )
      for plane, (down, across) in zip(planes, ((1, 1), factors, factors), strict=True)
    )
    cv2 = opencv.require()
    return cv2.cvtColor(cv2.merge([y, cr, cb]), cv2.COLOR_YCrCb2RGB)

  def _planes(self, rows: int) -> list[np.ndarray] | None:
    """Y, Cb and Cr of at least the first rows; None where libjpeg-turbo complains."""
    files = [self.source]
    if self.header.one_scan:
      # Of whole units, which are decoded anyway: libjpeg-turbo copies what it has to trim.
      height, width = (
        -(-n // u) * u for n, u in zip((rows, self.header.width), self.header.unit, strict=True)
      )
      end = jpeg.END if self.header.needs_all(rows) else _LAST + jpeg.END
      files.insert(0, self.header.sized(self.source, height, width, end=end))
    for data in files:
      try:
        return require().decode_to_yuv_planes(data)
      except _FAILED:
        pass
    return None
