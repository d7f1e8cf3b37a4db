"""Writes packed sets: reads, checks and stores the images of a folder or a TFDS set.

Every step can be cut short by a kill. A shard counts once a note on it lies in OUT/.packing, which
is written after the shard is on disk under its name; the set counts once its index lies in OUT.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from jepax.data import shards
from jepax.data.decode import BadExample, check
from jepax.data.origins import Origin
from jepax.lock import claim

_NOTES = ".packing"


@dataclasses.dataclass(frozen=True)
class Note:
  """A finished shard: its file, its labels, and (name, why) of what could not be read."""

  file: shards.File
  labels: tuple[int | None, ...]
  unreadable: tuple[tuple[str, str], ...]

  @classmethod
  def read(cls, path: Path) -> Note:
    content = json.loads(path.read_text())
    return cls(
      shards.File(**content["file"]),
      tuple(content["labels"]),
      tuple(map(tuple, content["unreadable"])),
    )


def pack(
  origin: Origin,
  out: str | os.PathLike,
  *,
  shard_bytes: int = 256 * 2**20,
  max_bad_fraction: float = 0.01,
  threads: int | None = None,
  report: Report | None = None,
) -> shards.Index:
  """Packs a set, or goes on where a former call was cut short.

  Args:
    origin: what to pack.
    out: the folder to write.
    shard_bytes: size of a shard, about; one image at least.
    max_bad_fraction: share of unreadable images, 0 to 1, above which there will be no index.
    threads: images read and checked at the same time; None for one a core.
    report: is told of what is done.

  Returns:
    The index, as it was written.

  Raises:
    ValueError: `out` holds something else, is being written to or is damaged, or too many images
      are unreadable.
  """
  folder, report = Path(out).expanduser(), report or Report()
  plan = {"version": shards.VERSION, "source": origin.identity, "shard_bytes": shard_bytes}
  with _claimed(folder):
    if shards.is_packed(folder):
      return _finished(folder, plan)
    notes = folder / _NOTES
    _claim_notes(notes, plan)
    ranges = _ranges(origin.sizes(), shard_bytes)
    done = _keep_finished(folder, len(ranges), threads)
    report.start(origin.identity["images"], shards=len(ranges), done=done.values())
    threads = threads or os.cpu_count()
    _write_missing(origin, folder, ranges, done, threads=threads, report=report)
    return _write_index(origin, folder, plan, done, max_bad_fraction=max_bad_fraction)


class Report:
  """Is told how packing goes; this one says nothing."""

  def start(self, images: int, *, shards: int, done: Iterable[Note]) -> None: ...

  def image(self, size: int) -> None: ...

  def shard(self, note: Note) -> None: ...


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
  """Makes the folder and keeps other packers out of it; a kill frees it."""
  folder.mkdir(parents=True, exist_ok=True)
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    taken = f"another process packs into {folder}; wait for it or stop it"
    claim(descriptor, folder, taken=taken)
    yield
  finally:
    os.close(descriptor)


def _finished(folder: Path, plan: dict[str, Any]) -> shards.Index:
  """The index of a set that is complete, if it is this one."""
  index = shards.Index.read(folder)
  _refuse_another(folder, {"source": index.source}, {"source": plan["source"]})
  shards.verify(folder)
  shutil.rmtree(folder / _NOTES, ignore_errors=True)  # a kill may have come before it went
  return index


def _refuse_another(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
  if found != wanted:
    raise ValueError(
      f"{folder} holds another set, or the source has changed: found {found}, asked for {wanted}; "
      "give another OUT, or delete this one"
    )


def _claim_notes(notes: Path, plan: dict[str, Any]) -> None:
  """Makes the folder of notes, or checks that it was made for the same plan."""
  path = notes / "plan.json"
  if path.is_file():
    _refuse_another(notes.parent, json.loads(path.read_text()), plan)
    return
  strangers = [entry.name for entry in notes.parent.iterdir() if entry != notes]
  if strangers:
    raise ValueError(f"{notes.parent} is no packed set and not empty: {sorted(strangers)[:5]}")
  notes.mkdir(exist_ok=True)
  write_file(path, json.dumps(plan).encode())


def _ranges(sizes: np.ndarray, shard_bytes: int) -> list[range]:
  """Cuts the examples into runs of about this size; the same ones for the same sizes."""
  # Of each example's last byte; a file may be empty.
  shard = np.maximum(np.cumsum(sizes) - 1, 0) // shard_bytes
  starts = np.flatnonzero(np.diff(shard, prepend=-1)).tolist()
  return [range(a, b) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def _name(number: int) -> str:
  return f"shard-{number:05d}.array_record"


def _keep_finished(folder: Path, count: int, threads: int | None) -> dict[int, Note]:
  """The shards that are finished and still what they were, by number."""

  def keep(number: int) -> Note | None:
    path = folder / _NOTES / f"{number:05d}.json"
    if not path.is_file():
      return None
    note = Note.read(path)
    try:
      note.file.check(folder, content=True)
    except ValueError:  # damaged since: it is packed again
      return None
    return note

  with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
    found = pool.map(keep, range(count))
    return {number: note for number, note in enumerate(found) if note is not None}


def _write_missing(
  origin: Origin,
  folder: Path,
  ranges: list[range],
  done: dict[int, Note],
  *,
  threads: int,
  report: Report,
) -> None:
  """Writes the shards that are not in `done`, and enters them there."""
  # A shard is flushed to disk and hashed while the next one is being read.
  with ThreadPoolExecutor(1) as finisher:
    last: Future | None = None
    for number in sorted(set(range(len(ranges))) - set(done)):
      labels, unreadable = _write_shard(origin, folder, number, ranges[number], threads, report)
      if last is not None:
        last.result()
      finish = functools.partial(_finish_shard, folder, number, labels, unreadable)
      last = finisher.submit(lambda n=number, f=finish: _enter(done, n, f(), report))
    if last is not None:
      last.result()


def _enter(done: dict[int, Note], number: int, note: Note, report: Report) -> None:
  done[number] = note
  report.shard(note)


def _write_shard(
  origin: Origin, folder: Path, number: int, rows: range, threads: int, report: Report
) -> tuple[list[int | None], list[tuple[str, str]]]:
  """Writes a shard under its temporary name; returns the labels and what was unreadable."""
  labels, unreadable = [], []
  # One record a group: any is read alone. Encoded images do not compress.
  writer = ArrayRecordWriter(str(_temporary(folder, number)), "group_size:1,uncompressed")
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
  fetch = functools.partial(_read, origin)
  with contextlib.closing(
    iter(grain.MapDataset.range(rows.start, rows.stop).map(fetch).to_iter_dataset(options))
  ) as examples:
    for found in examples:
      if isinstance(found, BadExample):
        name, _, reason = str(found).partition(": ")
        unreadable.append((name, reason))
        report.image(0)
        continue
      image, label, name = found
      writer.write(shards.encode_record(image, label=label, name=name))
      labels.append(label)
      report.image(len(image))
  writer.close()
  return labels, unreadable


def _read(origin: Origin, index: int) -> tuple[bytes, int | None, str] | BadExample:
  try:
    image, label, name = origin.read(index)
    check(image, name=name)
  except BadExample as error:
    return error
  return image, label, name


def _temporary(folder: Path, number: int) -> Path:
  return folder / _NOTES / _name(number)


def _finish_shard(
  folder: Path,
  number: int,
  labels: list[int | None],
  unreadable: list[tuple[str, str]],
) -> Note:
  """Flushes a shard to disk, gives it its name, then writes its note."""
  temporary, name = _temporary(folder, number), _name(number)
  reader = ArrayRecordReader(str(temporary))
  count = reader.num_records()
  reader.close()
  if count != len(labels):
    raise OSError(f"{temporary} holds {count} of {len(labels)} records; is the disk full?")
  _flush(temporary)
  file = shards.File(name, count, temporary.stat().st_size, shards.sha256(temporary))
  os.replace(temporary, folder / name)
  _flush(folder)
  note = Note(file, tuple(labels), tuple(unreadable))
  path = folder / _NOTES / f"{number:05d}.json"
  write_file(path, json.dumps(dataclasses.asdict(note)).encode())
  return note


def write_file(path: Path, content: bytes) -> None:
  """Writes a file whole or not at all, so that it outlives a kill and a power cut."""
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.write_bytes(content)
  _flush(temporary)
  os.replace(temporary, path)
  _flush(path.parent)


def _flush(path: Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _write_index(
  origin: Origin,
  folder: Path,
  plan: dict[str, Any],
  done: dict[int, Note],
  *,
  max_bad_fraction: float,
) -> shards.Index:
  """Writes the labels, then the index, which makes the set count; removes the notes."""
  notes = [done[number] for number in sorted(done)]
  unreadable = tuple(entry for note in notes for entry in note.unreadable)
  labels = [label for note in notes for label in note.labels]
  share = len(unreadable) / (len(unreadable) + len(labels))
  if share > max_bad_fraction or not labels:
    raise ValueError(
      f"{len(unreadable)} of {len(unreadable) + len(labels)} images are unreadable ({share:.1%}; "
      f"--max_bad_fraction={max_bad_fraction} allows {max_bad_fraction:.1%}), so no index is "
      f"written; the first: {': '.join(unreadable[0])}"
    )
  file = None
  if origin.class_names is not None:
    out = io.BytesIO()
    np.save(out, np.array(labels, np.int32))
    content = out.getvalue()
    write_file(folder / shards.LABELS, content)
    digest = hashlib.sha256(content).hexdigest()
    file = shards.File(shards.LABELS, len(labels), len(content), digest)
  files = tuple(note.file for note in notes)
  index = shards.Index(plan["source"], origin.class_names, files, file, unreadable)
  write_file(folder / shards.INDEX, json.dumps(index.to_json(), indent=1).encode())
  shutil.rmtree(folder / _NOTES)
  return index
