"""What can be packed: a folder of images, or a TFDS split."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from jepax.data.decode import Encoded
from jepax.data.sources import FolderSource, TfdsSource, open_tfds, scan_folder

_SPLITS = ("train", "val", "validation", "test")
_SAMPLE = 64  # examples whose mean size is taken for that of all of a TFDS set


class Origin(Protocol):
  """What is packed. identity: JSON that tells it from any other. class_names: or None."""

  identity: dict[str, Any]
  class_names: tuple[str, ...] | None

  def sizes(self) -> np.ndarray:
    """i64[n], bytes of each example, about."""
    ...

  def read(self, index: int) -> tuple[bytes, int | None, str]:
    """The encoded image, label and name of an example; raises BadExample."""
    ...


@dataclasses.dataclass(frozen=True)
class Folder:
  """A folder of images; labels by sub-folder."""

  source: FolderSource
  stats: np.ndarray  # i64[n 2], bytes and time of change, ns
  identity: dict[str, Any]

  @classmethod
  def scan(cls, root: str | os.PathLike) -> Folder:
    """Raises ValueError where there is no image, or the folder holds splits rather than classes."""
    path = Path(root).expanduser()
    splits = [name for name in _SPLITS if (path / name).is_dir()]
    if len(splits) > 1 and "train" in splits:
      commands = "; ".join(f"python -m jepax.data.pack {path / name} OUT/{name}" for name in splits)
      raise ValueError(f"{str(path)!r} holds the splits {splits}; pack each by itself: {commands}")
    source = scan_folder(path, channels=3)
    with ThreadPoolExecutor(32) as pool:
      found = pool.map(lambda file: os.stat(source.root / file), source.files)
      stats = np.array([(stat.st_size, stat.st_mtime_ns) for stat in found])
    digest = hashlib.sha256("\0".join(source.files).encode("utf-8", "surrogateescape"))
    digest.update(stats)
    identity = {
      "kind": "folder",
      "name": path.resolve().name,
      "images": len(source),
      "files": digest.hexdigest(),  # their names, sizes and times of change
    }
    return cls(source, stats, identity)

  @property
  def class_names(self) -> tuple[str, ...] | None:
    return self.source.class_names

  def sizes(self) -> np.ndarray:
    return self.stats[:, 0]

  def read(self, index: int) -> tuple[bytes, int | None, str]:
    name, labels = self.source.files[index], self.source.labels
    data = Encoded(self.source.root / name, 3, name).read()
    return data, None if labels is None else int(labels[index]), name


@dataclasses.dataclass(frozen=True)
class Tfds:
  """A prepared TFDS split: encoded images as they are, pixels as PNG."""

  source: TfdsSource
  identity: dict[str, Any]

  @classmethod
  def open(cls, name: str, *, split: str, data_dir: str | None, label: str) -> Tfds:
    """Raises ValueError as `open_tfds` does."""
    source = open_tfds(
      name, split=split, data_dir=data_dir, channels=3, memory_limit=0, label=label
    )
    full = source.records.dataset_info.full_name
    return cls(
      source,
      {"kind": "tfds", "name": full, "split": split, "label": label, "images": len(source)},
    )

  @property
  def class_names(self) -> tuple[str, ...] | None:
    return self.source.class_names

  def sizes(self) -> np.ndarray:
    sample = np.linspace(0, len(self.source) - 1, _SAMPLE).astype(int)
    mean = np.mean([len(self.read(int(index))[0]) for index in sample])
    return np.full(len(self.source), max(1, round(mean)))

  def read(self, index: int) -> tuple[bytes, int | None, str]:
    record = self.source.records[index]
    image = record["image"]
    if not isinstance(image, bytes):
      out = io.BytesIO()
      Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(out, "PNG")
      image = out.getvalue()
    label = int(self.source.label_of(record)) if self.class_names else None
    return image, label, f"{self.source.name}[{index}]"
