"""Where examples come from: arrays in memory, a folder of images, a TFDS data set."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import os
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jepax.data import clevr
from jepax.data.decode import BadExample, Encoded, convert_channels

Example = dict[str, Any]  # image u8[h w c], and label int where the source has labels
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FASHION_MNIST_CLASSES = (
  "t-shirt", "trouser", "pullover", "dress", "coat",
  "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


class Source(Protocol):
  """Examples by index.

  labels: i32[n], or None where there are none or knowing them would mean reading all examples.
  class_names: the name of each class, or None.
  """

  labels: np.ndarray | None
  class_names: tuple[str, ...] | None

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example:
    """Reads one example; raises BadExample when it can't be read."""
    ...


class EncodedSource:
  """What sources of encoded images share: decoding by Pillow, unless a transform does it.

  Subclasses have `encoded(index) -> Example`, whose image is an `Encoded` (or pixels, where the
  set is stored so), and which raises BadExample when it can't be read.
  """

  def __getitem__(self, index: int) -> Example:
    example = self.encoded(index)
    if isinstance(example["image"], Encoded):
      return {**example, "image": example["image"].decode()}
    return example


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
  """Images in memory, u8[n h w c] or u8[n h w], with labels i32[n] when known."""

  images: np.ndarray
  labels: np.ndarray | None = None
  class_names: tuple[str, ...] | None = None

  def __post_init__(self):
    images = np.asarray(self.images)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
      raise ValueError(
        f"images must be a non-empty u8[n h w c] or u8[n h w], found {images.dtype}"
        f"{list(images.shape)}; scale floats to 0..255 and use .astype(np.uint8)"
      )
    images = images if images.ndim == 4 else images[..., None]
    if images.shape[-1] not in (1, 3):
      raise ValueError(f"images must have 1 or 3 channels (last axis), found {images.shape[-1]}")
    object.__setattr__(self, "images", images)
    if self.labels is None:
      return
    labels = np.asarray(self.labels)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
      raise ValueError(
        f"labels must be integers of shape [{len(images)}], one an image, found {labels.dtype}"
        f"{list(labels.shape)}"
      )
    _check_classes(labels, self.class_names)
    object.__setattr__(self, "labels", labels.astype(np.int32))

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> Example:
    return self.rows(index)

  def rows(self, index: int | np.ndarray) -> Example:
    """One example, or a whole batch by an array of indices."""
    out = {"image": self.images[index]}
    return out if self.labels is None else {**out, "label": self.labels[index]}

  def with_channels(self, channels: int) -> ArraySource:
    """The same images in grey (1) or colour (3)."""
    return dataclasses.replace(self, images=convert_channels(self.images, channels=channels))


def _check_classes(labels: np.ndarray, names: tuple[str, ...] | None) -> None:
  low, high = int(labels.min()), int(labels.max())
  count = max(len(labels), 1000) if names is None else len(names)
  if low < 0 or high >= count:
    allowed = "number the classes from 0 without gaps" if names is None else f"classes are {names}"
    raise ValueError(f"labels must lie in 0..{count - 1}, found {low}..{high}; {allowed}")


def embedded(split: str) -> ArraySource:
  """The set that ships with jepax: 12,000 images of Fashion-MNIST, 28x28 grey, 10 classes.

  Args:
    split: 'train' (10,000) or 'test' (2,000); both are class-balanced.
  """
  if split not in ("train", "test"):
    raise ValueError(f"the embedded set has the splits 'train' and 'test', found {split!r}")
  path = resources.files("jepax.data") / "embedded" / "fashion_mnist_12k.npz"
  with path.open("rb") as file, np.load(file) as arrays:
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
  return ArraySource(images, labels, FASHION_MNIST_CLASSES)


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(EncodedSource):
  """Image files below a folder, decoded when read."""

  root: Path
  files: tuple[str, ...]  # relative to root
  channels: int
  labels: np.ndarray | None = None
  class_names: tuple[str, ...] | None = None

  def __len__(self) -> int:
    return len(self.files)

  def encoded(self, index: int) -> Example:
    path = self.root / self.files[index]
    out = {"image": Encoded(path, self.channels, str(path))}
    return out if self.labels is None else {**out, "label": self.labels[index]}

  def subset(self, index: np.ndarray) -> FolderSource:
    """The files of these indices."""
    labels = None if self.labels is None else self.labels[index]
    return dataclasses.replace(self, files=tuple(self.files[i] for i in index), labels=labels)


def scan_folder(
  root: str | os.PathLike, *, channels: int, class_names: tuple[str, ...] | None = None
) -> FolderSource:
  """Finds every image below a folder, in sorted order; hidden files and folders are left out.

  When every image lies in a sub-folder, the first-level sub-folders are the classes; else the
  images have no labels.

  Args:
    root: the folder.
    channels: 1 or 3, what images are decoded to.
    class_names: the classes of another split, which these labels then index.

  Raises:
    ValueError: the folder is missing, holds no image, or has a class that class_names lacks.
  """
  root = Path(root).expanduser()
  if not root.is_dir():
    raise ValueError(f"no folder {str(root)!r}; set data.path to a folder of images")
  files = tuple(sorted(_image_files(root)))
  if not files:
    raise ValueError(
      f"no image below {str(root)!r}; looked for {', '.join(IMAGE_SUFFIXES)} in all sub-folders"
    )
  parents = [file.split(os.sep, 1)[0] if os.sep in file else None for file in files]
  if None in parents:
    return FolderSource(root, files, channels)
  names = class_names or tuple(sorted(set(parents)))
  unknown = sorted(set(parents) - set(names))
  if unknown:
    raise ValueError(f"{str(root)!r} has classes the training split lacks: {unknown[:10]}")
  number = {name: i for i, name in enumerate(names)}
  labels = np.array([number[parent] for parent in parents], np.int32)
  return FolderSource(root, files, channels, labels, names)


def _image_files(root: Path) -> Iterator[str]:
  """Paths relative to root; follows links to folders, each real folder once."""
  seen = set()
  for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_raise):
    real = os.path.realpath(folder)
    if real in seen:
      subfolders.clear()
      continue
    seen.add(real)
    subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    relative = os.path.relpath(folder, root)
    for name in files:
      if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
        yield os.path.normpath(os.path.join(relative, name))


def _raise(error: OSError) -> None:
  raise error  # os.walk would leave out a folder it may not read, without a word


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource(EncodedSource):
  """A prepared TFDS split, read by index; images are decoded here, when read."""

  records: Any  # tfds data source whose images are left encoded
  name: str
  channels: int
  class_names: tuple[str, ...] | None = None
  size: tuple[int, int] | None = None  # height, width where all images share them
  labels: np.ndarray | None = None  # unknown before reading
  label_of: Callable[[dict[str, Any]], int] = operator.itemgetter("label")

  def __len__(self) -> int:
    return len(self.records)

  def encoded(self, index: int) -> Example:
    return self._encoded(self.records[int(index)], index)

  def read_all(self) -> ArraySource:
    """Reads the split into memory; needs images of one size. Raises BadExample."""
    images, labels = [], []
    for start in range(0, len(self), 1024):  # array_record reads many at once 6 times faster
      keys = range(start, min(start + 1024, len(self)))
      for key, record in zip(keys, self.records.__getitems__(keys), strict=True):
        example = self._encoded(record, key)
        image = example["image"]
        images.append(image.decode() if isinstance(image, Encoded) else image)
        labels += [example["label"]] if "label" in example else []
    return ArraySource(np.stack(images), np.array(labels) if labels else None, self.class_names)

  def _encoded(self, record: dict[str, Any], index: int) -> Example:
    image = record["image"]
    if isinstance(image, bytes):
      image = Encoded(image, self.channels, f"{self.name}[{index}]")
    else:
      image = convert_channels(image[None], channels=self.channels)[0]
    return (
      {"image": image, "label": int(self.label_of(record))}
      if self.class_names
      else {"image": image}
    )


def open_tfds(
  name: str,
  *,
  split: str,
  data_dir: str | None,
  channels: int,
  memory_limit: int,
  label: str = "label",
) -> TfdsSource | ArraySource:
  """Opens a TFDS split that is already prepared; never downloads.

  Args:
    name: data set, with config and version if wanted: 'fashion_mnist', 'imagenet2012:5.1.0'.
    split: a split or a slice of one, 'train[:90%]'.
    data_dir: where it was prepared; None for the default of TFDS.
    channels: 1 or 3.
    memory_limit: bytes; a set of fixed image size whose pixels fit is read into memory once,
      as reading it by the item is 10 times slower than training on it.
    label: the feature that holds the class, or a name of `clevr.LABELS`.

  Raises:
    ValueError: unknown name or split, not prepared, or without the feature `image`.
  """
  import tensorflow_datasets as tfds  # a second of import that only this source pays

  builder = _prepared_builder(name, data_dir)
  features = dict(builder.info.features.items())
  image = features.get("image")
  if image is None or image.np_dtype != np.uint8 or len(image.shape) != 3:
    raise ValueError(f"TFDS set {name!r} has no feature 'image' of u8[h w c]; found {features}")
  label_of, classes = _labels(name, features, label)
  encoded = isinstance(image, tfds.features.Image)
  try:
    records = builder.as_data_source(
      split, decoders={"image": tfds.decode.SkipDecoding()} if encoded else None
    )
  except NotImplementedError:
    raise ValueError(
      f"TFDS set {name!r} in {builder.data_dir!s} is stored without access by index; prepare it "
      f"anew in another folder: {_prepare_command(name)}"
    ) from None
  except ValueError as error:
    splits = sorted(builder.info.splits)
    raise ValueError(f"TFDS set {name!r} has the splits {splits}, found {split!r}") from error
  size = image.shape[:2] if None not in image.shape[:2] else None
  source = TfdsSource(records, f"{name}/{split}", channels, classes, size, label_of=label_of)
  return _cached(source, memory_limit)


def _labels(name: str, features: dict[str, Any], label: str) -> tuple[Callable, tuple | None]:
  """How a record's class is read, and the classes' names; None for a set without."""
  import tensorflow_datasets as tfds

  found = features.get(label)
  if isinstance(found, tfds.features.ClassLabel):
    return operator.itemgetter(label), tuple(found.names)
  if label in clevr.LABELS and "objects" in features:
    return clevr.LABELS[label]
  if label != "label":
    named = [key for key, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    allowed = named + (list(clevr.LABELS) if "objects" in features else [])
    raise ValueError(f"data.label={label!r} is no label of TFDS set {name!r}; it has {allowed}")
  return operator.itemgetter(label), None


def _prepared_builder(name: str, data_dir: str | None) -> Any:
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    known = tfds.list_builders(with_community_datasets=False)  # the others need the network
    near = difflib.get_close_matches(name.split("/")[0], known, n=3)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise ValueError(f"no TFDS set {name!r}, by that name or in {data_dir!r}{hint}") from None
  except (AssertionError, ValueError) as error:  # a version or config there is not
    raise ValueError(f"no TFDS set {name!r}: {str(error).splitlines()[0]}") from error
  if not builder.is_prepared():
    raise ValueError(
      f"TFDS set {name!r} is not prepared in {builder.data_dir!s}; run {_prepare_command(name)}"
    )
  return builder


def _prepare_command(name: str) -> str:
  build = f"tfds build {name} --file_format=array_record --data_dir=..."
  return f"`{build}` (which needs `pip install tensorflow`), and set data.path to it"


def _cached(source: TfdsSource, memory_limit: int) -> TfdsSource | ArraySource:
  if source.size is None or len(source) * math.prod(source.size) * source.channels > memory_limit:
    return source
  try:
    return source.read_all()
  except BadExample:
    return source  # reads it item by item, so that the loader skips and counts what is bad
