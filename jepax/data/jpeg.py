"""What stands before the pixels of a JPEG, and how to have only the first rows of them decoded.

A JPEG of one scan is decoded from top to bottom, and its header says how far. With a smaller height
there a decoder stops early, and what it has decoded are the same pixels. It then skips the rest of
them, and complains of that at the next marker; so whoever has some rows left out also chooses what
stands at the end.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import struct

BLOCK = 8  # pixels of a side, of what is transformed at a time
END = b"\xff\xd9"  # cut files lack it, and decoders would fill what is missing with grey

_START, _SCAN, _RESTARTS = b"\xff\xd8", 0xDA, 0xDD
_APP1, _APP2, _ADOBE = 0xE1, 0xE2, 0xEE
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # those with a size; the rest is rare
_SIZE = struct.Struct(">HH")
_FRAME = struct.Struct(">BHHB")  # bits, height, width, number of components; three bytes of each
_LARGEST = 65500  # pixels of a side that libjpeg takes; rounded to units it still has two bytes
_MARKER = re.compile(rb"\xff[^\0]")
_SAMPLINGS = {(1, 1), (1, 2), (2, 2), (2, 1), (1, 4)}  # 4:4:4, 4:2:2, 4:2:0, 4:4:0 and 4:1:1


@dataclasses.dataclass(frozen=True)
class Header:
  """Of a whole JPEG of 8 bits, grey or of three channels.

  height, width: as stored, pixels.
  unit: (rows, columns) of the blocks of pixels that stand together.
  factors: rows and columns of the image to one of Cb and Cr; None of what has other channels or an
    unusual sampling.
  one_scan: whether each row is complete before the next begins, and no restarts are in between.
  notes: whether something may say how to turn it, or that it is the first of several.
  size: where height and width stand in the bytes. pixels: where those of the scan begin.
  """

  height: int
  width: int
  unit: tuple[int, int]
  factors: tuple[int, int] | None
  one_scan: bool
  notes: bool
  size: int
  pixels: int

  def needs_all(self, rows: int) -> bool:
    """Whether no row of units can be left out where these rows of pixels are needed."""
    return not self.one_scan or -(-rows // self.unit[0]) >= -(-self.height // self.unit[0])

  def sized(self, data: bytes, height: int, width: int, *, end: bytes = END) -> bytes:
    """The same bytes with another size, of as many units a row, and with another end."""
    size = _SIZE.pack(height, width)
    return b"".join((data[: self.size], size, data[self.size + _SIZE.size : -len(END)], end))

  def ends_once(self, data: bytes) -> bool:
    """Whether the end is the first marker after the pixels; other images may follow on them."""
    return _MARKER.search(data, self.pixels).start() == len(data) - len(END)


def read(data: bytes) -> Header | None:
  """Reads what stands before the pixels; None where it is damaged or of another kind."""
  if not (data.startswith(_START) and data.endswith(END)):
    return None
  found = _segments(data)
  frames = [(kind, at, content) for kind in _FRAMES & found.keys() for at, content in found[kind]]
  if len(frames) != 1 or _SCAN not in found:
    return None
  [(kind, at, frame)], [(start, scan)] = frames, found[_SCAN]
  if kind not in (_BASELINE, _EXTENDED, _PROGRESSIVE) or len(frame) < _FRAME.size:
    return None
  bits, height, width, channels = _FRAME.unpack_from(frame)
  components = frame[_FRAME.size :]
  names, samplings = components[::3], [(byte & 15, byte >> 4) for byte in components[1::3]]
  known = bits == 8 and channels in (1, 3) and len(components) == 3 * channels
  sound = 0 < min(height, width) <= max(height, width) <= _LARGEST and all(map(all, samplings))
  if not known or not sound or start + len(scan) + len(END) > len(data):
    return None
  rows, columns = map(max, zip(*samplings, strict=True)) if channels == 3 else (1, 1)
  # As libjpeg tells them; all that is neither named RGB nor of a kind of Adobe's is YCbCr.
  ycbcr = names != b"RGB" and all(content[11:12] == b"\1" for _, content in found[_ADOBE])
  usual = channels == 3 and samplings[1:] == [(1, 1)] * 2 and samplings[0] in _SAMPLINGS
  return Header(
    height=height,
    width=width,
    unit=(BLOCK * rows, BLOCK * columns),
    factors=samplings[0] if ycbcr and usual else None,
    one_scan=kind != _PROGRESSIVE and scan[:1] == frame[5:6] and not found[_RESTARTS],
    notes=bool(found[_APP1]) or any(content[:4] == b"MPF\0" for _, content in found[_APP2]),
    size=at + 1,
    pixels=start + len(scan),
  )


def _segments(data: bytes) -> dict[int, list[tuple[int, bytes]]]:
  """What stands before the pixels: by kind, where it begins and its bytes; the scan's header too.

  Of a file with anything between its segments, there is none of the scan.
  """
  found, at, kind = collections.defaultdict(list), len(_START), None
  while kind != _SCAN and data[at : at + 1] == b"\xff":
    kind, stop = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    found[kind].append((at + 4, data[at + 4 : stop]))
    at = stop
  return found
