"""The OpenCV decoder and resize, against Pillow's."""

from __future__ import annotations

import io
import sys
import types

import numpy as np
import pytest
from PIL import Image

from jepax.data import opencv
from jepax.data.build import build, defaults
from jepax.data.decode import BadExample, Encoded, decode
from jepax.data.loader import Loader
from jepax.data.sources import scan_folder
from jepax.data.transforms import CenterCrop, RandomResizedCrop, resize

ROWS, COLUMNS = np.mgrid[0:240, 0:320]
# Smooth, without symmetry: an image whose pixels say where they are.
SCENE = np.stack([ROWS * 255 / 240, COLUMNS * 255 / 320, 128 + 90 * np.sin(ROWS / 30)], -1)
SCENE = SCENE.astype(np.uint8)


def encode(image, kind="JPEG", **options):
  out = io.BytesIO()
  image.save(out, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
  return out.getvalue()


def picture(data, channels=3):
  return opencv.Picture.of(Encoded(data, channels, "photo 7"))


def whole(data, channels=3, reduction=1):
  found = picture(data, channels)
  size = (found.height, found.width)
  smaller = tuple(n // reduction for n in size)
  return found.resized((0, 0, *size), smaller, interpolation="bilinear")


def assert_near(found, expected, *, most, mean=None):
  off = np.abs(found.astype(int) - expected)
  assert found.shape == expected.shape and found.dtype == np.uint8
  assert off.max() <= most and (mean is None or off.mean() <= mean), (off.max(), off.mean())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_has_the_pixels_of_pillow(channels):
  for image in (Image.fromarray(SCENE), Image.fromarray(SCENE[..., 0])):
    data = encode(image)
    # 1: two builds of libjpeg-turbo. 2 more for grey: libjpeg's luma is not rounded through RGB.
    assert_near(whole(data, channels), decode(data, channels=channels, name=""), most=3)


@pytest.mark.parametrize("orientation", range(1, 10))  # 9 means nothing
@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_orientation_is_that_of_pillow(orientation, reduction):
  exif = Image.Exif()
  exif[274] = orientation
  data = encode(Image.fromarray(SCENE), exif=exif)
  upright = Image.fromarray(decode(data, channels=3, name=""))
  expected = np.asarray(upright.reduce(reduction))
  # JPEG's halving differs from a mean by a few levels at edges of the scene.
  assert_near(whole(data, reduction=reduction), expected, most=8)


@pytest.mark.parametrize(
  "data",
  [
    encode(Image.fromarray(SCENE).convert("CMYK")),
    encode(Image.fromarray(SCENE), "PNG"),
    encode(Image.fromarray(np.dstack([SCENE, SCENE[..., 0]])), "PNG"),
    encode(Image.fromarray(SCENE[..., 0].astype(np.uint16) * 257), "PNG"),
    encode(Image.fromarray(SCENE).quantize(8), "GIF"),
    encode(Image.fromarray(SCENE)) + b"\0\0",
  ],
  ids=["cmyk", "png", "alpha", "16 bit", "palette", "bytes after the end"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_other_files_are_pillows(data, channels):
  expected = decode(data, channels=channels, name="")
  np.testing.assert_array_equal(whole(data, channels), expected)
  found = picture(data, channels).resized((10, 20, 100, 120), (100, 120), interpolation="area")
  np.testing.assert_array_equal(found, expected[10:110, 20:140])


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"no image at all",
    encode(Image.fromarray(SCENE))[:-400],
    encode(Image.fromarray(SCENE))[:300],
    encode(Image.fromarray(SCENE))[:-400] + b"\xff\xd9",
    encode(Image.fromarray(SCENE), "PNG")[:60],
  ],
  ids=["empty", "text", "cut jpeg", "jpeg's header", "cut jpeg with an end", "cut png"],
)
def test_what_pillow_cannot_read_is_a_bad_example(data):
  try:
    decode(data, channels=3, name="")
  except BadExample:
    with pytest.raises(BadExample, match="photo 7: "):
      whole(data)
  else:  # Pillow fills what is missing of a JPEG that has an end, so OpenCV may
    assert data.endswith(b"\xff\xd9") and whole(data).shape == SCENE.shape


def test_a_missing_file_is_a_bad_example(tmp_path):
  with pytest.raises(BadExample, match="gone: FileNotFoundError"):
    opencv.Picture.of(Encoded(tmp_path / "a.jpg", 3, "gone"))


def test_a_jpeg_is_reduced_where_the_crop_stays_large_enough(monkeypatch):
  data, reductions = encode(Image.fromarray(SCENE)), []
  real = opencv.Picture._cut
  monkeypatch.setattr(
    opencv.Picture, "_cut", lambda self, *args: reductions.append(args[2]) or real(self, *args)
  )
  for box, size, reduction in (
    ((0, 0, 240, 320), (121, 10), 1),
    ((0, 0, 240, 320), (120, 160), 2),
    ((0, 0, 240, 320), (30, 40), 8),
    ((0, 0, 240, 320), (4, 4), 8),
    ((7, 13, 130, 150), (60, 60), 2),
    ((7, 13, 130, 150), (32, 60), 2),
    ((7, 13, 131, 149), (30, 33), 4),
    ((7, 13, 50, 50), (60, 60), 1),
  ):
    found = picture(data).resized(box, size, interpolation="bilinear")
    assert reductions.pop() == reduction, (box, size)
    top, left, height, width = box
    expected = resize(SCENE[top : top + height, left : left + width], size, interpolation="area")
    # The scene rises by about one level a pixel of the source: a shift by one of a pixel of the
    # reduced image is 2 to 8 levels. Averaging a ramp in steps of 8 bits is off by half a level.
    assert_near(found, expected, most=5)
    assert abs((found.astype(int) - expected).mean((0, 1))).max() < 0.7, (box, size)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
  "box", [(10.5, 20.25, 100, 120.5), (0.75, 0, 239.25, 319.5), (3.5, 2.5, 20, 30), (7.5, 9, 80, 80)]
)
@pytest.mark.parametrize("size", [(80, 80), (33, 150), (130, 41)])
def test_a_box_may_begin_and_end_within_pixels(box, size, interpolation):
  waves = np.stack([np.sin(ROWS / 9), np.sin(COLUMNS / 11), np.sin((ROWS + COLUMNS) / 14)], -1)
  image = (128 + 110 * waves).round().astype(np.uint8)
  top, left, height, width = box
  found = opencv.resize(image, size, interpolation=interpolation, box=box)
  corners = (left, top, left + width, top + height)
  expected = resize(image, size, interpolation=interpolation, box=corners)
  inner = (slice(3, -3), slice(3, -3))  # Pillow also weighs pixels outside of the box
  # Two kernels of the same width. The waves rise by up to 12 levels a pixel: of a box rounded to
  # whole pixels 6 to 13 are measured.
  assert_near(found[inner], expected[inner].astype(int), most=3)


@pytest.mark.parametrize("interpolation, most", [("bilinear", 12), ("bicubic", 20)])
@pytest.mark.parametrize("size", [(100, 90), (200, 300), (300, 500), (30, 200), (50, 40)])
def test_resize_is_near_pillows(interpolation, most, size):
  noise = np.random.default_rng(0).normal(0, 3, SCENE.shape)  # of a camera
  image = np.clip(SCENE + noise, 0, 255).astype(np.uint8)
  expected = resize(image, size, interpolation=interpolation)
  found = opencv.resize(image, size, interpolation=interpolation)
  # Another kernel of the same width: on noise of 3 levels they differ by about one.
  assert_near(found, expected, most=most, mean=1.2)
  grey = opencv.resize(np.ascontiguousarray(image[..., :1]), size, interpolation=interpolation)
  assert grey.shape == (*size, 1)
  np.testing.assert_array_equal(grey[..., 0], found[..., 0])


@pytest.mark.parametrize("factor", [1.9, 2.2, 2.5, 3.7, 7.3])
def test_stripes_finer_than_the_result_turn_grey(factor):
  """Those of two pixels would be a moire of full contrast without antialiasing."""
  image = np.zeros((400, 400, 1), np.uint8)
  image[:, ::2] = 255
  size = (int(400 / factor), int(400 / factor))
  found = opencv.resize(image, size, interpolation="bilinear")[:, 5:-5]
  cv2 = opencv.require()
  plain = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)[:, 5:-5]
  # Measured: 9 to 26 levels, against 63 to 74 of linear interpolation alone.
  assert found.std() < 0.45 * plain.std() and plain.std() > 60
  assert abs(found.mean() - 127.5) < 2


@pytest.mark.parametrize("size", [64, 200])
def test_transforms_cut_where_pillows_do(size):
  data = encode(Image.fromarray(SCENE))
  pixels = decode(data, channels=3, name="")
  for kind in (RandomResizedCrop, CenterCrop):
    plain, fast = kind(size), kind(size, decoder="opencv")
    for seed in range(5):
      expected = plain(pixels, np.random.default_rng(seed))
      # The scene rises by about one level a pixel: crops agree to a pixel or so, DCT included.
      for image, most in ((pixels, 4), (Encoded(data, 3, "x"), 10)):
        assert_near(fast(image, np.random.default_rng(seed)), expected, most=most, mean=1.5)


def test_the_loader_reads_by_opencv_and_counts_what_is_bad(tmp_path):
  for i in range(8):
    data = encode(Image.fromarray(SCENE[: 100 + i]))
    (tmp_path / f"{i}.jpg").write_bytes(data[: len(data) // 2] if i == 3 else data)
  source = scan_folder(tmp_path, channels=3)
  batches = {}
  for decoder in ("pillow", "opencv"):
    options = {"batch_size": 4, "seed": 0, "start": 0, "stop": 4, "threads": 2, "prefetch": 2}
    crop = RandomResizedCrop(32, decoder=decoder)
    with Loader(source, crop, max_bad_fraction=0.5, **options) as loader:
      batches[decoder] = np.stack([batch["image"] for batch in loader])
      assert loader.bad_examples == 1
  assert_near(batches["opencv"], batches["pillow"], most=12, mean=1.5)  # as above
  assert (batches["opencv"] != batches["pillow"]).any()


def config(**changes):
  result = defaults()
  result.update(changes)
  return result


def test_the_config_chooses_and_says_what_is_missing(monkeypatch):
  assert build(config(size=20)).eval_transform.decoder == "pillow"
  data = build(config(size=20, decoder="opencv", crop_scale=(0.3, 1.0)))
  assert data.train_transform.decoder == data.eval_transform.decoder == "opencv"
  with pytest.raises(
    ValueError, match=r"data.decoder='cv2' is unknown.*'pillow', 'opencv', 'turbojpeg'"
  ):
    build(config(decoder="cv2"))
  monkeypatch.setitem(sys.modules, "cv2", None)  # not installed
  with pytest.raises(ValueError, match=r"needs OpenCV .*pip install 'jepax\[opencv\]'"):
    build(config(decoder="opencv"))


@pytest.mark.parametrize(
  "error, message",
  [
    (None, r"needs PyTurboJPEG \(.*pip install 'jepax\[turbojpeg\]'"),
    (
      RuntimeError("Unable to locate turbojpeg library automatically. You may\nspecify"),
      r"needs the library libturbojpeg \(Unable to locate[^\n]*apt install libturbojpeg",
    ),
    (OSError("libturbojpeg.so.0: cannot open"), r"\(libturbojpeg.so.0: cannot.*brew install"),
    (
      RuntimeError("PyTurboJPEG 2.0 requires libjpeg-turbo 3.0 or later.\nThe loaded"),
      r"requires libjpeg-turbo 3.0 or later. The library .* older: pip install 'PyTurboJPEG<2'",
    ),
  ],
  ids=["package", "library", "unreadable", "version"],
)
def test_the_config_says_what_turbojpeg_lacks(monkeypatch, error, message):
  def missing():
    raise error

  module = None if error is None else types.SimpleNamespace(TurboJPEG=missing)
  monkeypatch.setitem(sys.modules, "turbojpeg", module)
  with pytest.raises(ValueError, match=message + r".*data.decoder='opencv'"):
    build(config(decoder="turbojpeg"))
