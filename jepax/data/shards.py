"""Packed data sets: ArrayRecord shards of encoded images, and the source that reads them.

A folder that `python -m jepax.data.pack` wrote holds:

  index.json                 written last: without it nothing here counts
  labels.npy                 i32[n], where there are labels
  shard-00000.array_record   one record an example: i32 label (-1 for none), u16 length of the
                             name, the name, the encoded image; little-endian

Any example is one read by index, so all processes open the same files and read different rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import grain
import numpy as np

from jepax.data.decode import BadExample, Encoded
from jepax.data.sources import EncodedSource, Example

VERSION = 1
INDEX, LABELS = "index.json", "labels.npy"
_HEADER = struct.Struct("<iH")


@dataclasses.dataclass(frozen=True)
class File:
  """A file of a packed set. records: examples in it. sha256: of its bytes, in hexadecimal."""

  name: str
  records: int
  bytes: int
  sha256: str

  def check(self, folder: Path, *, content: bool) -> None:
    """Raises ValueError where the file is missing, has another size or, if asked, other content."""
    path = folder / self.name
    try:
      found = path.stat().st_size
    except OSError as error:
      raise ValueError(f"{path} can't be read: {error.strerror}; {_REPAIR}") from error
    if found != self.bytes:
      raise ValueError(f"{path} has {found:,} bytes, the index says {self.bytes:,}; {_REPAIR}")
    if content and (digest := sha256(path)) != self.sha256:
      raise ValueError(f"{path} has the sha256 {digest}, the index says {self.sha256}; {_REPAIR}")


_REPAIR = "copy the folder anew, or delete it and pack again"


@dataclasses.dataclass(frozen=True)
class Index:
  """What index.json says.

  source: what was packed. class_names: or None. shards: in the order of their examples.
  labels: the file of labels, or None. unreadable: (name, why) of the images that were left out.
  """

  source: dict[str, Any]
  class_names: tuple[str, ...] | None
  shards: tuple[File, ...]
  labels: File | None
  unreadable: tuple[tuple[str, str], ...] = ()
  version: int = VERSION

  @property
  def count(self) -> int:
    return sum(shard.records for shard in self.shards)

  @property
  def files(self) -> tuple[File, ...]:
    return self.shards if self.labels is None else (*self.shards, self.labels)

  def to_json(self) -> dict[str, Any]:
    return {**dataclasses.asdict(self), "count": self.count}

  @classmethod
  def read(cls, folder: Path) -> Index:
    """Reads the index of a packed folder; raises ValueError where there is none, or a newer one."""
    try:
      content = json.loads((folder / INDEX).read_text())
    except FileNotFoundError:
      raise ValueError(
        f"{str(folder)!r} holds no {INDEX}; make it with `python -m jepax.data.pack SOURCE "
        f"{folder}`, again if that was cut short"
      ) from None
    except ValueError as error:
      raise ValueError(f"{folder / INDEX} is damaged ({error}); {_REPAIR}") from error
    if not isinstance(content, dict) or "version" not in content:
      raise ValueError(f"{folder / INDEX} is not of `python -m jepax.data.pack`; {_REPAIR}")
    if content["version"] != VERSION:
      raise ValueError(
        f"{folder / INDEX} has format version {content['version']}, this jepax reads {VERSION}; "
        "pack it anew"
      )
    names, labels = content["class_names"], content["labels"]
    return cls(
      source=content["source"],
      class_names=None if names is None else tuple(names),
      shards=tuple(File(**shard) for shard in content["shards"]),
      labels=None if labels is None else File(**labels),
      unreadable=tuple(map(tuple, content["unreadable"])),
    )


def encode_record(image: bytes, *, label: int | None, name: str) -> bytes:
  """One example as the bytes of a record."""
  text = name.encode("utf-8", "surrogateescape")
  return _HEADER.pack(-1 if label is None else label, len(text)) + text + image


def decode_record(record: bytes) -> tuple[bytes, int | None, str]:
  """The image, label and name of a record."""
  label, length = _HEADER.unpack_from(record)
  start = _HEADER.size + length
  name = record[_HEADER.size : start].decode("utf-8", "surrogateescape")
  return record[start:], None if label < 0 else label, name


def sha256(path: Path) -> str:
  """The digest of a file, in hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class ShardSource(EncodedSource):
  """Packed examples, read by index; safe to read from many threads.

  rows: i64[n], which records of the set these are.
  """

  records: grain.sources.ArrayRecordDataSource
  path: str
  channels: int
  rows: np.ndarray
  labels: np.ndarray | None = None
  class_names: tuple[str, ...] | None = None

  def __len__(self) -> int:
    return len(self.rows)

  def encoded(self, index: int) -> Example:
    row = int(self.rows[index])
    try:
      image, _, name = decode_record(self.records[row])
    except RuntimeError as error:  # a checksum of ArrayRecord's that fails
      raise BadExample(f"{self.path}[{row}]: {error}") from error
    out = {"image": Encoded(image, self.channels, f"{self.path}[{row}] ({name})")}
    return out if self.labels is None else {**out, "label": self.labels[index]}

  def subset(self, index: np.ndarray) -> ShardSource:
    """The examples of these indices."""
    labels = None if self.labels is None else self.labels[index]
    return dataclasses.replace(self, rows=self.rows[index], labels=labels)


def is_packed(path: str | os.PathLike) -> bool:
  """Whether a folder holds a finished packed set."""
  return (Path(path).expanduser() / INDEX).is_file()


def open_shards(
  path: str | os.PathLike, *, channels: int, class_names: tuple[str, ...] | None = None
) -> ShardSource:
  """Opens a packed set; checks the size of each file, reads the index and the labels alone.

  Args:
    path: the folder that `python -m jepax.data.pack` wrote.
    channels: 1 or 3, what images are decoded to.
    class_names: the classes of another split, which these labels then index.

  Raises:
    ValueError: not a finished packed set, a file of another size, or a class that class_names
      lacks.
  """
  folder = Path(path).expanduser()
  index = Index.read(folder)
  for file in index.files:
    file.check(folder, content=file is index.labels)
  # The counts in brackets spare opening every shard now.
  paths = [f"{folder / shard.name}[0:{shard.records}]" for shard in index.shards]
  labels, names = None, index.class_names
  if index.labels is not None:
    labels = np.load(folder / index.labels.name)
    if class_names is not None and names is not None:
      labels, names = _renumber(labels, names, class_names, where=folder), class_names
  records = grain.sources.ArrayRecordDataSource(paths)
  return ShardSource(records, str(folder), channels, np.arange(index.count), labels, names)


def _renumber(
  labels: np.ndarray, names: tuple[str, ...], wanted: tuple[str, ...], *, where: Path
) -> np.ndarray:
  """Labels that number `names` as labels that number `wanted`."""
  unknown = sorted(set(names) - set(wanted))
  if unknown:
    raise ValueError(f"{str(where)!r} has classes the training split lacks: {unknown[:10]}")
  number = {name: i for i, name in enumerate(wanted)}
  return np.array([number[name] for name in names], np.int32)[labels]


def verify(path: str | os.PathLike) -> Index:
  """Reads every file of a packed set and compares its checksum.

  Raises:
    ValueError: a file that is missing or differs.
  """
  folder = Path(path).expanduser()
  index = Index.read(folder)
  for file in index.files:
    file.check(folder, content=True)
  return index
