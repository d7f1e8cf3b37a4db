"""Images a CPU-second: torchvision on Pillow against jepax with each decoder; and the loader.

  python benchmarks/input.py PHOTOS... [--rounds=7] [--count=24] [--out=benchmarks/results]

PHOTOS are image files or folders of them; every one is cut to 4:3 and stored as a JPEG of quality
90 at 500x375 and at 1600x1200 in memory. Then decode, random resized crop to 224 and a flip of
every second image, by each side in turn on the same bytes, in one thread, in CPU time of the
process. Without torchvision the same operations are written with Pillow; the result says which.
Decoders that are not installed are left out.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import io
import itertools
import json
import math
import os
import pathlib
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from types import ModuleType

import numpy as np
from PIL import Image, ImageOps

from jepax.data import opencv, origins, packing
from jepax.data.decode import Encoded
from jepax.data.loader import Loader
from jepax.data.shards import open_shards
from jepax.data.sources import IMAGE_SUFFIXES
from jepax.data.transforms import DECODERS, FAST, RandomResizedCrop


def _torchvision() -> ModuleType | None:
  """torchvision.transforms, or None: the same operations are then written here."""
  try:
    import torch
    from torchvision import transforms
  except ImportError:
    return None
  except RuntimeError:  # built for another torch; no operator is called, so their names are enough
    names = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
      names.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import transforms
  return transforms


torchvision = _torchvision()

RESULTS = pathlib.Path(__file__).parent / "results"
SIZES = ((500, 375), (1600, 1200))  # the mean of ImageNet, and a photo of a phone scaled down
SCALES = ((0.3, 1.0), (0.08, 1.0))  # I-JEPA's crops, and torchvision's default
SIDE = 224


def jpegs(paths: list[pathlib.Path], size: tuple[int, int]) -> list[bytes]:
  """Each photo as a JPEG of this size."""
  found = []
  for path in paths:
    out = io.BytesIO()
    photo = ImageOps.fit(Image.open(path).convert("RGB"), size, Image.Resampling.LANCZOS)
    photo.save(out, "JPEG", quality=90)
    found.append(out.getvalue())
  return found


def torchvision_pipeline(scale: tuple[float, float]) -> Callable[[bytes, int], np.ndarray]:
  """The usual pipeline of a torchvision data set, without the conversion to floats."""
  steps = torchvision.Compose(
    [torchvision.RandomResizedCrop(SIDE, scale=scale), torchvision.RandomHorizontalFlip()]
  )
  return lambda data, seed: np.asarray(steps(Image.open(io.BytesIO(data)).convert("RGB")))


def pillow_pipeline(scale: tuple[float, float]) -> Callable[[bytes, int], np.ndarray]:
  """The same operations as torchvision's, for where it is not installed."""

  def run(data: bytes, seed: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    area = image.width * image.height * random.uniform(*scale)
    aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    width = min(image.width, round(math.sqrt(area * aspect)))
    height = min(image.height, round(math.sqrt(area / aspect)))
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    crop = image.crop((left, top, left + width, top + height))
    image = crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    if random.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)

  return run


def jepax_pipeline(scale: tuple[float, float], decoder: str) -> Callable[[bytes, int], np.ndarray]:
  """jepax's crop; the flip, which it does on the device, is done here as well."""
  flip = opencv_flip if decoder in FAST else pillow_flip
  crop = RandomResizedCrop(SIDE, scale, decoder=decoder)

  def run(data: bytes, seed: int) -> np.ndarray:
    image = Encoded(data, 3, "photo")
    image = image if decoder in FAST else image.decode()
    out = crop(image, np.random.default_rng(seed))
    return flip(out) if seed % 2 else out

  return run


def pillow_flip(image: np.ndarray) -> np.ndarray:
  return np.asarray(Image.fromarray(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def opencv_flip(image: np.ndarray) -> np.ndarray:
  return opencv.require().flip(image, 1)


def installed() -> list[str]:
  """The decoders that can be measured here; says why the others can't."""
  found = []
  for decoder in DECODERS:
    try:
      if decoder in FAST:
        FAST[decoder].require()
      found.append(decoder)
    except ValueError as error:
      print(f"{decoder} is left out: {error}", file=sys.stderr)
  return found


def pipelines(
  scale: tuple[float, float], decoders: list[str]
) -> dict[str, Callable[[bytes, int], np.ndarray]]:
  """Every side by its name; the reference first."""
  reference = pillow_pipeline if torchvision is None else torchvision_pipeline
  return {"reference": reference(scale)} | {
    decoder: jepax_pipeline(scale, decoder) for decoder in decoders
  }


def rate(pipeline: Callable, photos: list[bytes], seeds: range) -> float:
  """Images a CPU-second."""
  start = time.process_time()
  for data, seed in itertools.product(photos, seeds):
    pipeline(data, seed)
  return len(photos) * len(seeds) / (time.process_time() - start)


def measure(
  photos: list[bytes], scale: tuple[float, float], rounds: int, count: int, decoders: list[str]
) -> dict:
  """Median rates over rounds in which the sides take turns, and the ratios of each round."""
  sides = pipelines(scale, decoders)
  found = {name: [] for name in sides}
  seeds = range(max(1, count // len(photos)))
  for _ in range(rounds + 1):  # the first warms up
    for name, pipeline in sides.items():
      found[name].append(rate(pipeline, photos, seeds))
  rates = {name: statistics.median(values[1:]) for name, values in found.items()}
  ratios = {
    decoder: statistics.median(
      a / b for a, b in zip(found[decoder][1:], found["reference"][1:], strict=True)
    )
    for decoder in decoders
  }
  return {
    "crop_scale": scale,
    "images_per_cpu_second": rates,
    "ratio": ratios,
    "pixel_difference": {
      decoder: difference(sides["pillow"], sides[decoder], photos, seeds)
      for decoder in decoders
      if decoder in FAST
    },
  }


def difference(a: Callable, b: Callable, photos: list[bytes], seeds: range) -> dict:
  """How far the pixels of two pipelines are apart, of 255."""
  differences = [
    np.abs(a(data, seed).astype(int) - b(data, seed))
    for data, seed in itertools.product(photos, seeds)
  ]
  return {
    "mean": float(np.mean(differences)),
    "rms": float(np.sqrt(np.mean(np.square(differences)))),
    "max": int(np.max(differences)),
  }


def measure_loader(
  photos: list[bytes], decoders: list[str], *, batches: int, batch_size: int
) -> list[dict]:
  """The whole input side: shards on disk to batches in memory, all cores."""
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    for i, data in enumerate(photos * (-(-2 * batch_size // len(photos)))):
      path = root / "images" / f"{i % 8}" / f"{i}.jpg"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)
    packing.pack(origins.Folder.scan(root / "images"), root / "packed")
    source = open_shards(root / "packed", channels=3)
    for decoder in decoders:
      crop = RandomResizedCrop(SIDE, SCALES[0], decoder=decoder)
      options = {"batch_size": batch_size, "seed": 0, "start": 0, "stop": batches}
      threads = os.cpu_count()
      options |= {"threads": threads, "prefetch": threads, "max_bad_fraction": 0.0}
      wall, cpu = time.perf_counter(), time.process_time()
      with Loader(source, crop, **options) as loader:
        images = sum(len(batch["image"]) for batch in loader)
      rows.append(
        {
          "decoder": decoder,
          "threads": threads,
          "images_per_second": images / (time.perf_counter() - wall),
          "images_per_cpu_second": images / (time.process_time() - cpu),
        }
      )
  return rows


def hardware(photos: list[pathlib.Path], decoders: list[str]) -> dict:
  packages = ["pillow", "numpy", "grain", "array-record"]
  packages += ["opencv-python-headless"] if "opencv" in decoders else []
  packages += ["PyTurboJPEG"] if "turbojpeg" in decoders else []
  packages += [] if torchvision is None else ["torchvision", "torch"]
  return {
    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    "load_at_start": round(os.getloadavg()[0], 1),
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
    "reference": "the same operations by Pillow" if torchvision is None else "torchvision",
    "photos": len(photos),
    "date": datetime.date.today().isoformat(),
    "command": " ".join(["python benchmarks/input.py PHOTOS", *_options()]),
  }


def _options() -> list[str]:
  return [argument for argument in sys.argv[1:] if argument.startswith("--")]


def markdown(rows: list[dict], loads: list[dict], where: dict) -> str:
  """The results as tables, the ratio first."""
  lines = [
    "# Input: images a CPU-second",
    "",
    f"Decode, random resized crop to {SIDE}, flip; the same JPEGs of quality 90, one thread, one "
    "run, the sides taking turns; medians of rounds. The reference is "
    f"{where['reference']} (bilinear, antialiased). Pixel differences are those of jepax's decoder "
    "to its Pillow form on the same crops, of 255.",
    "",
    "| ratio to reference | decoder | JPEGs | crops, share of the area | reference | jepax | "
    "difference: mean | rms | largest |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    rates, scale = row["images_per_cpu_second"], row["crop_scale"]
    for decoder, ratio in row["ratio"].items():
      off = row["pixel_difference"].get(decoder)
      shown = f"{off['mean']:.2f} | {off['rms']:.2f} | {off['max']}" if off else "0 | 0 | 0"
      lines.append(
        f"| {ratio:.2f} | {decoder} | {row['size']} | {scale[0]} to {scale[1]} | "
        f"{rates['reference']:.0f} | {rates[decoder]:.0f} | {shown} |"
      )
  lines += [
    "",
    f"The whole loader, from shards on disk to batches, crops of {SCALES[0][0]} to {SCALES[0][1]}:",
    "",
    "| JPEGs | decoder | threads | images a second | images a CPU-second |",
    "|---|---|---|---|---|",
    *(
      f"| {row['size']} | {row['decoder']} | {row['threads']} | {row['images_per_second']:.0f} | "
      f"{row['images_per_cpu_second']:.0f} |"
      for row in loads
    ),
    "",
    *(f"- {name}: {value}" for name, value in where.items()),
    "",
  ]
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("photos", nargs="+", type=pathlib.Path, help="image files or folders")
  parser.add_argument("--rounds", type=int, default=7, help="timed turns; their median counts")
  parser.add_argument("--count", type=int, default=24, help="images a turn")
  parser.add_argument("--batches", type=int, default=8, help="of the loader, of 64 images")
  parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the results")
  args = parser.parse_args()
  decoders = installed()
  files = itertools.chain.from_iterable(p.rglob("*") if p.is_dir() else [p] for p in args.photos)
  photos = sorted(path for path in files if path.name.lower().endswith(IMAGE_SUFFIXES))
  if not photos:
    parser.error(f"no image among {[str(path) for path in args.photos]}")
  where, rows, loads = hardware(photos, decoders), [], []
  for size in SIZES:
    data, name = jpegs(photos, size), {"size": f"{size[0]}x{size[1]}"}
    rows += [name | measure(data, scale, args.rounds, args.count, decoders) for scale in SCALES]
    measured = measure_loader(data, decoders, batches=args.batches, batch_size=64)
    loads += [name | row for row in measured]
  args.out.mkdir(parents=True, exist_ok=True)
  text = markdown(rows, loads, where)
  (args.out / "input.md").write_text(text)
  (args.out / "input.json").write_text(
    json.dumps({**where, "rows": rows, "loader": loads}, indent=2) + "\n"
  )
  print(text)


if __name__ == "__main__":
  main()
