"""JPEGs of which only the first rows are decoded: the same pixels, and nothing printed."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from jepax.data import jpeg, opencv, turbojpeg
from jepax.data.decode import Encoded, decode

cv2 = opencv.require()
ROWS, COLUMNS = np.mgrid[0:259, 0:83]  # of whole blocks neither way
WAVES = np.stack([np.sin(ROWS / 9), np.sin(COLUMNS / 7), np.sin((ROWS + 2 * COLUMNS) / 20)], -1)
NOISE = np.random.default_rng(0).normal(0, 12, WAVES.shape)  # so that rows take some bytes
SCENE = (128 + 90 * WAVES + NOISE).clip(0, 255).astype(np.uint8)
SAMPLINGS = {name: getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}") for name in (
  "444", "422", "420", "440", "411"
)}  # fmt: skip
BOXES = ((0, 7, 60, 70), (0, 0, 1, 83), (33, 5, 98, 61), (130, 12, 96, 64), (160, 0, 99, 83))


def encode(pixels=SCENE, sampling="420", **options):
  flags = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[sampling], cv2.IMWRITE_JPEG_QUALITY, 92]
  for name, value in options.items():
    flags += [getattr(cv2, f"IMWRITE_JPEG_{name}"), value]
  return cv2.imencode(".jpg", pixels, flags)[1].tobytes()


def by_pillow(**options):
  out = io.BytesIO()
  Image.fromarray(SCENE).save(out, "JPEG", quality=92, **options)
  return out.getvalue()


def with_segment(data, kind, content):
  return data[:2] + bytes([0xFF, kind]) + struct.pack(">H", len(content) + 2) + content + data[2:]


def three_scans():
  """A sequential JPEG whose components follow each other, each in a scan of its own."""
  files = [encode(np.ascontiguousarray(SCENE[..., i])) for i in range(3)]
  frame = files[0].index(b"\xff\xc0")
  size = files[0][frame + 5 : frame + 9]
  parts = b"".join(bytes([i, 0x11, 0]) for i in (1, 2, 3))
  out = files[0][:frame] + b"\xff\xc0\0\x11\x08" + size + b"\x03" + parts
  out += files[0][frame + 13 : files[0].index(b"\xff\xda")]
  for i, file in enumerate(files, 1):
    pixels = file[file.index(b"\xff\xda") + 10 : -2]
    out += b"\xff\xda\0\x08\x01" + bytes([i, 0, 0, 63, 0]) + pixels
  return out + jpeg.END


@pytest.fixture(params=[opencv, turbojpeg], ids=["opencv", "turbojpeg"])
def kind(request):
  """A decoder; skips where its native library is not installed, and says so."""
  try:
    request.param.require()
  except ValueError as error:
    pytest.skip(str(error))
  return request.param


@pytest.fixture
def sizes(monkeypatch):
  """The rows that decoders are asked for where it is not all."""
  found, real = [], jpeg.Header.sized

  def sized(self, data, height, width, *, end=jpeg.END):
    if end != jpeg.END:
      found.append(height)
    return real(self, data, height, width, end=end)

  monkeypatch.setattr(jpeg.Header, "sized", sized)
  return found


def crop(kind, data, box, size, *, channels=3, whole=False):
  picture = kind.Picture.of(Encoded(data, channels, "photo 7"))
  with pytest.MonkeyPatch.context() as patch:
    if whole:
      patch.setattr(jpeg.Header, "needs_all", lambda *_: True)
    return picture.resized(box, size, interpolation="bilinear")


def assert_same(kind, data, box, size, **options):
  found, expected = (crop(kind, data, box, size, whole=whole, **options) for whole in (False, True))
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_rows_left_out_change_no_pixel(capfd, sizes, kind, sampling, reduction, channels):
  data = encode(sampling=sampling)
  for top, left, height, width in (*BOXES, *((top, 3, 40, 71) for top in range(60, 77))):
    size = (max(1, height // reduction), max(1, width // reduction))
    assert_same(kind, data, (top, left, height, width), size, channels=channels)
  assert min(sizes) <= 32 and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("channels", [1, 3])
def test_grey(capfd, sizes, kind, channels):
  data = encode(np.ascontiguousarray(SCENE[..., 0]))
  for box in BOXES:
    assert_same(kind, data, box, box[2:], channels=channels)
  assert min(sizes) < 8 and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
  "shape", [(61, 83), (16, 16), (17, 1), (1, 17), (8, 8), (24, 40), (33, 71)]
)
@pytest.mark.parametrize("sampling", ["444", "420"])
def test_small_images(capfd, kind, shape, sampling):
  data = encode(np.ascontiguousarray(SCENE[: shape[0], : shape[1]]), sampling)
  for height in range(1, shape[0] + 1):
    assert_same(kind, data, (0, 0, height, shape[1]), (height, shape[1]))
  assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("reduction", [1, 2])
def test_orientation_says_which_rows_are_needed(capfd, sizes, kind, orientation, reduction):
  exif = Image.Exif()
  exif[274] = orientation
  data = with_segment(encode(), 0xE1, exif.tobytes())
  picture = kind.Picture.of(Encoded(data, 3, "photo 7"))
  assert (picture.height, picture.width) == decode(data, channels=3, name="").shape[:2]
  for top in (0, picture.height - 50):
    for left in (0, picture.width - 41):
      assert_same(kind, data, (top, left, 50, 41), (50 // reduction, 41 // reduction))
  assert min(sizes) <= 80 and capfd.readouterr() == ("", "")


THUMBNAIL = encode(np.ascontiguousarray(SCENE[:40, :40]))
UNCUT = {
  "progressive": encode(PROGRESSIVE=1),
  "restarts": encode(RST_INTERVAL=6),
  "three scans": three_scans(),
}
APPENDED = {
  "another image": encode() + encode(np.ascontiguousarray(SCENE[::-1])),
  "rows said at the end": encode()[:-2] + b"\xff\xdc\0\x04" + struct.pack(">H", 259) + jpeg.END,
}
CUT = {
  "optimised": encode(OPTIMIZE=1),
  "comment with a frame": with_segment(
    encode(), 0xFE, b"\xff\xc0\0\x11\x08\0\x08\0\x08\x03\xff\xda"
  ),
  "thumbnail": with_segment(encode(), 0xE0, b"JFXX\0\x10" + THUMBNAIL),
  "thumbnail in exif": with_segment(encode(), 0xE1, b"Exif\0\0" + THUMBNAIL),
  "rgb": by_pillow(keep_rgb=True),
  "icc profile": by_pillow(icc_profile=b"\xff\xda" * 2000),
}


@pytest.mark.parametrize("name", [*UNCUT, *APPENDED, *CUT])
def test_which_files_are_cut(capfd, sizes, kind, name):
  data = (UNCUT | APPENDED | CUT)[name]
  pixels = decode(data, channels=3, name="")
  found = crop(kind, data, (10, 20, 60, 50), (60, 50))
  if name not in APPENDED:  # libjpeg-turbo tells by itself, and is asked again
    assert bool(sizes) == (name in CUT)
  assert capfd.readouterr() == ("", "")
  off = np.abs(found.astype(int) - pixels[10:70, 20:70])
  # Of noise in colour, which libjpeg and OpenCV interpolate in different ways.
  assert off.max() <= (3 if kind is opencv else 40) and off.mean() < 3


def spoiled(where):
  """A file that ends early, or has what is no code from some point on; with an end."""
  data = encode()
  at = round(len(data) * where)
  return {"cut": data[:at] + jpeg.END, "wrong": data[:at] + b"\xff\0" * 2000 + jpeg.END}


@pytest.mark.parametrize("damage", ["cut", "wrong"])
def test_damage_below_the_crop_goes_unseen(capfd, kind, damage):
  for reduction in (1, 2):
    box, size = (20, 7, 90, 70), (90 // reduction, 70 // reduction)
    found, expected = (crop(kind, data, box, size) for data in (spoiled(0.6)[damage], encode()))
    np.testing.assert_array_equal(found, expected)
  assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["cut", "wrong"])
def test_damage_in_the_crop_is_treated_as_of_the_whole(kind, damage):
  for where in (0.2, 0.4, 0.6):
    data = spoiled(where)[damage]
    for reduction in (1, 2):
      size = (180 // reduction, 70 // reduction)
      found = crop(kind, data, (20, 7, 180, 70), size)
      expected = crop(opencv, data, (20, 7, 180, 70), size, whole=True)
      np.testing.assert_array_equal(found, expected)


def test_headers_say_what_pillow_says():
  for data in (UNCUT | APPENDED | CUT).values():
    with Image.open(io.BytesIO(data)) as image:
      header = jpeg.read(data)
      assert header is None or (header.width, header.height) == image.size
  found = {name: jpeg.read(encode(sampling=name)) for name in SAMPLINGS}
  factors = {"444": (1, 1), "422": (1, 2), "420": (2, 2), "440": (2, 1), "411": (1, 4)}
  assert {name: header.factors for name, header in found.items()} == factors
  assert {name: header.unit for name, header in found.items()} == {
    name: (8 * rows, 8 * columns) for name, (rows, columns) in factors.items()
  }
  assert jpeg.read(CUT["rgb"]).factors is None
  assert jpeg.read(encode().replace(b"\xff\xc0", b"\xff\xc9", 1)) is None  # arithmetic
  assert jpeg.read(with_segment(encode(), 0xE2, b"MPF\0")).notes  # one of several images
  assert not jpeg.read(encode()).notes
  at = jpeg.read(encode()).size
  assert jpeg.read(encode()[:at] + b"\xff\xff\xff\xff" + encode()[at + 4 :]) is None  # too large
  assert jpeg.read(encode(np.ascontiguousarray(SCENE[..., 0]))).unit == (8, 8)


def test_damaged_headers_raise_nothing():
  data = encode(np.ascontiguousarray(SCENE[:40, :40]))
  pixels = jpeg.read(data).pixels
  files = [data[:stop] for stop in range(pixels + 2)]
  files += [cut + jpeg.END for cut in files]
  rng = np.random.default_rng(0)
  for file in [data] * 2000 + [data[:pixels] + jpeg.END] * 500:
    broken = bytearray(file)
    broken[rng.integers(pixels)] = rng.integers(256)
    files.append(bytes(broken))
  for file in files:
    header = jpeg.read(file)
    assert header is None or header.ends_once(file) in (True, False)
