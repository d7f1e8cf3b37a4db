"""One image file, of any mode Pillow reads, as uint8 pixels."""

from __future__ import annotations

import dataclasses
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# What Pillow raises on files that are damaged, cut short, missing or no image at all.
UNREADABLE = (
  OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error, zlib.error,
  Image.DecompressionBombError,
)  # fmt: skip


class BadExample(Exception):
  """An example that can't be read; the loader skips it, counts it and names it once."""


@dataclasses.dataclass(frozen=True)
class Encoded:
  """An image that is not decoded yet.

  file: its path, or its bytes. channels: 1 or 3, wanted of its pixels. name: for errors.
  """

  file: Path | bytes
  channels: int
  name: str

  def read(self) -> bytes:
    """The bytes; raises BadExample."""
    if isinstance(self.file, bytes):
      return self.file
    try:
      return self.file.read_bytes()
    except OSError as error:
      raise BadExample(f"{self.name}: {type(error).__name__}: {error}") from error

  def decode(self) -> np.ndarray:
    """The pixels, u8[h w channels], by Pillow; raises BadExample."""
    return decode(self.file, channels=self.channels, name=self.name)


def decode(file: Path | str | bytes, *, channels: int, name: str) -> np.ndarray:
  """Decodes an image, upright as its EXIF tag says.

  Transparent pictures are laid on white, as a viewer shows them; 16-bit grey keeps its high
  byte; of an animation the first frame is taken.

  Args:
    file: a path, or the encoded bytes.
    channels: 1 for grey (ITU-R 601 luma), 3 for RGB.
    name: how errors call this example.

  Returns:
    u8[h w channels].

  Raises:
    BadExample: the file can't be read as an image.
  """
  try:
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
      pixels = np.asarray(_convert(ImageOps.exif_transpose(image), channels))
  except UNREADABLE as error:
    raise BadExample(f"{name}: {type(error).__name__}: {error}") from error
  return pixels.reshape(*pixels.shape[:2], channels)


def check(data: bytes, *, name: str) -> None:
  """Raises BadExample where `decode` would; twice as fast on JPEGs, whose pixels stay undecoded."""
  try:
    with Image.open(io.BytesIO(data)) as image:
      image.draft(image.mode, (1, 1))
      _convert(ImageOps.exif_transpose(image), 3)
  except UNREADABLE as error:
    raise BadExample(f"{name}: {type(error).__name__}: {error}") from error


def _convert(image: Image.Image, channels: int) -> Image.Image:
  if image.mode == "F":
    raise ValueError("a float image has no known range; save it with 8 or 16 bits")
  if image.mode.startswith("I"):  # Pillow's own conversion clips 16 bits to 8, it does not scale
    image = Image.fromarray((_sixteen_bits(image) >> 8).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  return image.convert("L" if channels == 1 else "RGB")


def _sixteen_bits(image: Image.Image) -> np.ndarray:
  pixels = np.asarray(image)
  if pixels.min() < 0 or pixels.max() > 65535:
    raise ValueError(f"32-bit pixels from {pixels.min()} to {pixels.max()}; allowed is 0 to 65535")
  return pixels


def convert_channels(images: np.ndarray, *, channels: int) -> np.ndarray:
  """Grey to colour without a copy (a read-only view), or colour to grey by ITU-R 601 luma.

  Args:
    images: u8[n h w 1] or u8[n h w 3].
    channels: 1 or 3.

  Returns:
    u8[n h w channels].
  """
  found = images.shape[-1]
  if found == channels:
    return images
  if found == 1:
    return np.broadcast_to(images, (*images.shape[:-1], channels))
  luma = [np.asarray(Image.fromarray(image).convert("L")) for image in images]
  return np.stack(luma)[..., None]
