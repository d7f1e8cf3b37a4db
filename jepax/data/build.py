"""Config -> data: the sources of a run and how their images come to the model's size."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict, config_dict

from jepax.data.shards import ShardSource, is_packed, open_shards
from jepax.data.sources import (
  ArraySource,
  FolderSource,
  Source,
  TfdsSource,
  embedded,
  open_tfds,
  scan_folder,
)
from jepax.data.transforms import (
  DECODERS,
  FAST,
  INTERPOLATIONS,
  CenterCrop,
  RandomResizedCrop,
  Transform,
)
from jepax.names import nearest, one_of

_EVAL_FOLDERS = ("val", "validation", "test")
_STATISTICS_IMAGES = 2000


def defaults() -> ConfigDict:
  """The data section of a config: the embedded Fashion-MNIST subset."""
  config = ConfigDict()
  config.source = "embedded"  # 'embedded', 'tfds', 'folder' or 'shards' (see jepax.data.pack)
  config.name = config_dict.placeholder(str)  # TFDS name, 'imagenet2012'
  config.path = config_dict.placeholder(str)  # root of the folder or shards, or data_dir of TFDS
  config.label = "label"  # TFDS feature of the class; clevr_count and clevr_distance of CLEVR
  config.train_split = "train"  # TFDS split or slice, or sub-folder
  config.eval_split = "test"  # the same for held-out examples; '' for none
  config.eval_fraction = 0.1  # share of a folder without eval sub-folder that is held out
  config.size = 28  # side of the square the model sees, pixels
  config.channels = 1  # 1 grey, 3 colour
  config.crop_scale = (1.0, 1.0)  # area range of random crops on the host; (1, 1) is none
  config.crop_ratio = (3 / 4, 4 / 3)  # width / height range of these crops
  config.interpolation = "bilinear"  # or 'bicubic'; always antialiased
  config.eval_resize = 256 / 224  # held-out: shorter side to size * this, then the middle
  config.mean = (0.2860,)  # per channel, of pixels in [0, 1]
  config.std = (0.3530,)
  config.decoder = "pillow"  # torchvision's pixels; faster: 'opencv', 'turbojpeg' (extras)
  config.threads = 8  # batches decoded at the same time
  config.prefetch = 8  # batches held ready
  config.max_bad_fraction = 0.01  # share of unreadable examples above which a run stops
  config.memory_limit = 2**31  # bytes; smaller TFDS sets of one image size are held in memory
  return config


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
  """What a run trains and is judged on.

  train: the examples to learn from.
  test: held-out examples, with or without labels, or None.
  train_transform, eval_transform: for the loader and for probes; None where every image already
    has the right size.
  size: side of the square images, pixels. channels: 1 or 3.
  num_classes, class_names: None where there are no labels.
  mean, std: per channel, of pixels in [0, 1].
  name: of the set, for people. given: whether the caller made it, so that no config describes it.
  """

  train: Source
  test: Source | None
  train_transform: Transform | None
  eval_transform: Transform | None
  size: int
  channels: int
  num_classes: int | None
  class_names: tuple[str, ...] | None
  mean: tuple[float, ...]
  std: tuple[float, ...]
  name: str
  given: bool = False

  @classmethod
  def unread(cls, section: ConfigDict, *, count: int) -> Data:
    """As many training images as `section`'s would be, for what looks at shapes and reads none."""
    blank = np.broadcast_to(np.zeros((), np.uint8), (count, 1, 1, section.channels))
    normalisation = dict(mean=section.mean, std=section.std)
    return cls.from_arrays(blank, size=section.size, channels=section.channels, **normalisation)

  @classmethod
  def from_arrays(
    cls,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    test_images: np.ndarray | None = None,
    test_labels: np.ndarray | None = None,
    *,
    size: int | None = None,
    channels: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    class_names: tuple[str, ...] | None = None,
  ) -> Data:
    """Data from numpy arrays.

    Args:
      images: u8[n h w] or u8[n h w c] with c 1 or 3.
      labels: integers [n] from 0, for probes only.
      test_images: held out, like images.
      test_labels: like labels.
      size: side of the square the model sees; None for the height of `images`.
      channels: 1 or 3; None for those of `images`.
      mean: per channel, of pixels in [0, 1]; None to measure it on up to 2,000 images.
      std: as mean.
      class_names: one a class.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    train = ArraySource(images, labels, class_names)
    config = defaults()
    config.size = size or train.images.shape[1]
    config.channels = channels or train.images.shape[-1]
    measured = _statistics(train, config.channels)
    config.mean = measured[0] if mean is None else tuple(mean)
    config.std = measured[1] if std is None else tuple(std)
    _check(config)
    test = None if test_images is None else ArraySource(test_images, test_labels, class_names)
    found = _assemble(train, test, config, name=f"{len(train):,} images of your own")
    return dataclasses.replace(found, given=True)

  def fingerprint(self) -> str:
    """A hash of the images and labels where they are arrays, else of how many there are."""
    digest = hashlib.sha256()
    for source in (self.train, self.test):
      if isinstance(source, ArraySource):
        digest.update(np.ascontiguousarray(source.images))
        digest.update(np.ascontiguousarray(source.labels if source.labels is not None else ()))
      else:
        digest.update(str(None if source is None else len(source)).encode())
    return digest.hexdigest()


def build(config: ConfigDict) -> Data:
  """Opens the sources that a config names.

  Args:
    config: exactly the keys of `defaults()`.

  Raises:
    ValueError: a wrong key or value, a missing or empty folder, a TFDS set not prepared.
  """
  _check(config)
  train, test = _SOURCES[config.source](config)
  names = {"tfds": config.name, "embedded": "embedded Fashion-MNIST"}
  names |= {"folder": config.path, "shards": config.path}
  return _assemble(train, test, config, name=names[config.source])


def _embedded(config: ConfigDict) -> tuple[Source, Source | None]:
  if config.path:
    raise ValueError(
      f"data.path={config.path!r} is not read by data.source='embedded'; set data.source to "
      "'folder' or 'tfds', or remove data.path"
    )
  return embedded(config.train_split), embedded(config.eval_split) if config.eval_split else None


def _tfds(config: ConfigDict) -> tuple[Source, Source | None]:
  if not config.name:
    raise ValueError("data.source='tfds' needs data.name, for example 'fashion_mnist'")
  train, test = (
    open_tfds(
      config.name,
      split=split,
      data_dir=config.path,
      channels=config.channels,
      memory_limit=config.memory_limit,
      label=config.label,
    )
    if split
    else None
    for split in (config.train_split, config.eval_split)
  )
  return train, test


def _folder(config: ConfigDict) -> tuple[Source, Source | None]:
  if not config.path:
    raise ValueError("data.source='folder' needs data.path, the folder of the images")
  root = Path(config.path).expanduser()
  if config.train_split != defaults().train_split and not (root / config.train_split).is_dir():
    raise ValueError(f"no folder {config.train_split!r} in {str(root)!r}; set data.train_split")
  train, test = _split_folders(root, config)
  source = scan_folder(train or root, channels=config.channels)
  if not config.eval_split:
    return source, None
  if test is not None:
    names = source.class_names
    return source, scan_folder(test, channels=config.channels, class_names=names)
  return (
    _hold_out(source, fraction=config.eval_fraction) if config.eval_fraction else (source, None)
  )


def _shards(config: ConfigDict) -> tuple[Source, Source | None]:
  """The sets in the sub-folders of the splits, or one set of which a share is held out."""
  if not config.path:
    raise ValueError("data.source='shards' needs data.path, what `python -m jepax.data.pack` wrote")
  root = Path(config.path).expanduser()
  if is_packed(root):
    source = open_shards(root, channels=config.channels)
    if not config.eval_split or not config.eval_fraction:
      return source, None
    return _hold_out(source, fraction=config.eval_fraction)
  source = open_shards(root / config.train_split, channels=config.channels)
  if not config.eval_split:
    return source, None
  evals = [name for name in (config.eval_split, *_EVAL_FOLDERS) if is_packed(root / name)]
  test = root / (evals[0] if evals else config.eval_split)
  return source, open_shards(test, channels=config.channels, class_names=source.class_names)


def _split_folders(root: Path, config: ConfigDict) -> tuple[Path | None, Path | None]:
  """The sub-folders that are splits. A lone 'train' among others is a class (of vehicles)."""
  found = {path.name for path in root.iterdir() if path.is_dir()} if root.is_dir() else set()
  if config.train_split not in found:
    return None, None
  evals = [name for name in (config.eval_split, *_EVAL_FOLDERS) if name in found]
  if evals:
    return root / config.train_split, root / evals[0]
  return (root / config.train_split if len(found) == 1 else None), None


def _hold_out(
  source: FolderSource | ShardSource, *, fraction: float
) -> tuple[FolderSource | ShardSource, FolderSource | ShardSource]:
  """Splits off the same share of every class, at least one image of it, the same ones always."""
  labels = np.zeros(len(source), np.int32) if source.labels is None else source.labels
  rng = np.random.default_rng(0)  # not the run's seed: all runs on a folder share one split
  held = np.zeros(len(source), bool)
  for label in np.unique(labels):
    members = rng.permutation(np.flatnonzero(labels == label))
    count = min(max(1, round(fraction * len(members))), len(members) - 1)
    held[members[:count]] = True
  if not held.any():
    raise ValueError(
      f"each of the {len(source)} images is a class of its own, so none can be held out; put all "
      "in one folder, or set data.eval_split=''"
    )
  return source.subset(np.flatnonzero(~held)), source.subset(np.flatnonzero(held))


_SOURCES = {"embedded": _embedded, "tfds": _tfds, "folder": _folder, "shards": _shards}


def _assemble(train: Source, test: Source | None, config: ConfigDict, *, name: str) -> Data:
  size, how = config.size, (config.interpolation, config.decoder)
  train_transform: Transform | None = CenterCrop(size, 1.0, *how)
  eval_transform: Transform | None = CenterCrop(size, config.eval_resize, *how)
  sized = [_has_size(source, size) for source in (train, test) if source is not None]
  scale, ratio = tuple(config.crop_scale), tuple(config.crop_ratio)
  if scale != (1.0, 1.0):
    train_transform = RandomResizedCrop(size, scale, ratio, *how)
  elif sized[0]:
    train_transform = None
  train, test = (_with_channels(source, config.channels) for source in (train, test))
  _check_labels(train, test)
  labelled = [s for s in (train, test) if s is not None and (s.class_names or s.labels is not None)]
  return Data(
    train=train,
    test=test,
    train_transform=train_transform,
    eval_transform=None if all(sized) else eval_transform,
    size=size,
    channels=config.channels,
    num_classes=_num_classes(labelled[0]) if labelled else None,
    class_names=labelled[0].class_names if labelled else None,
    mean=tuple(config.mean),
    std=tuple(config.std),
    name=name,
  )


def _has_size(source: Source, size: int) -> bool:
  if isinstance(source, ArraySource):
    return source.images.shape[1:3] == (size, size)
  return isinstance(source, TfdsSource) and source.size == (size, size)


def _with_channels(source: Source | None, channels: int) -> Source | None:
  return source.with_channels(channels) if isinstance(source, ArraySource) else source


def _num_classes(source: Source) -> int:
  return len(source.class_names) if source.class_names else int(source.labels.max()) + 1


def _check_labels(train: Source, test: Source | None) -> None:
  """Raises ValueError on test labels that no training image has a class for."""
  if test is None or train.labels is None or test.labels is None:
    return
  count, most = _num_classes(train), int(test.labels.max())
  if most >= count:
    raise ValueError(
      f"a test label is {most} and the training images have the classes 0 to {count - 1}; number "
      "the classes of both alike"
    )


def _statistics(source: ArraySource, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and std per channel of evenly spaced images, of pixels in [0, 1]."""
  every = -(-len(source) // _STATISTICS_IMAGES)
  sample = ArraySource(source.images[::every]).with_channels(channels).images / 255
  std = np.maximum(sample.std((0, 1, 2)), 1e-3)  # a constant channel stays finite
  return tuple(sample.mean((0, 1, 2)).tolist()), tuple(std.tolist())


def _check(config: ConfigDict) -> None:
  """Raises ValueError on a wrong key or value, before anything is read."""
  known = set(defaults())
  for key in sorted(set(config) - known):
    raise ValueError(f"data.{key} is unknown{nearest(key, known)}; allowed: {sorted(known)}")
  if missing := sorted(known - set(config)):
    raise ValueError(f"data lacks the keys {missing}; start from jepax.data.build.defaults()")
  one_of(config.source, _SOURCES, where="data.source")
  one_of(config.decoder, DECODERS, where="data.decoder")
  if config.decoder in FAST:
    FAST[config.decoder].require()
  one_of(config.interpolation, INTERPOLATIONS, where="data.interpolation")
  c = config.channels
  for key, right, allowed in (
    ("channels", c in (1, 3), "1 (grey) or 3 (colour)"),
    ("size", 1 <= config.size <= 8192, "1 to 8192 pixels"),
    ("crop_scale", _is_range(config.crop_scale, most=1), "(low, high), 0 < low <= high <= 1"),
    ("crop_ratio", _is_range(config.crop_ratio), "(low, high), 0 < low <= high"),
    ("eval_resize", config.eval_resize >= 1, "at least 1"),
    ("mean", _are_shares(config.mean, c), f"{c} numbers from 0 to 1, one a channel"),
    (
      "std",
      _are_shares(config.std, c) and min(config.std) > 0,
      f"{c} numbers above 0 and at most 1, one a channel",
    ),
    ("eval_fraction", 0 <= config.eval_fraction < 1, "from 0 to below 1"),
    ("threads", config.threads >= 1, "at least 1"),
    ("prefetch", config.prefetch >= 1, "at least 1"),
    ("max_bad_fraction", 0 <= config.max_bad_fraction <= 1, "from 0 to 1"),
    ("memory_limit", config.memory_limit >= 0, "bytes, at least 0"),
    ("train_split", bool(config.train_split), "the name of a split"),
  ):
    if not right:
      raise ValueError(f"data.{key}={config[key]!r}; allowed: {allowed}")


def _are_shares(values: tuple[float, ...], count: int) -> bool:
  """Whether they can be statistics of pixels in [0, 1]; those of 0 to 255 are a common mistake."""
  return len(values) == count and all(0 <= value <= 1 for value in values)


def _is_range(values: tuple[float, float], *, most: float = float("inf")) -> bool:
  return len(values) == 2 and 0 < values[0] <= values[1] <= most
