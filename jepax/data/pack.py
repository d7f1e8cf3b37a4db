"""Packs images into checksummed ArrayRecord shards that `data.source=shards` reads by index.

  python -m jepax.data.pack FOLDER OUT [--shard_mb=256]
  python -m jepax.data.pack tfds:NAME OUT --split=train [--data_dir=DIR] [--label=label]
  python -m jepax.data.pack --verify OUT

One OUT a split: pack IMAGENET/train to SHARDS/train and IMAGENET/val to SHARDS/val, then set
data.source=shards, data.path=SHARDS and data.eval_split=val. Encoded images are kept as they are.
Each is checked by decoding it; those that can't be read are left out, counted, and named in
OUT/index.json. Cut short, even by kill -9, the same command goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from absl import app, flags, logging
from rich import progress
from rich.console import Console

from jepax import cli
from jepax.data import origins, packing, shards

SHARD_MB = flags.DEFINE_integer("shard_mb", 256, "Size of a shard, MiB, about.", lower_bound=1)
SPLIT = flags.DEFINE_string("split", "train", "Split of a TFDS set, or a slice of one.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the TFDS set was prepared.")
LABEL = flags.DEFINE_string("label", "label", "The TFDS feature that holds the class.")
MAX_BAD_FRACTION = flags.DEFINE_float(
  "max_bad_fraction", 0.01, "Share of unreadable images above which packing fails.", 0.0, 1.0
)
VERIFY = flags.DEFINE_bool("verify", False, "Read all of a packed set and compare its checksums.")


class Screen(packing.Report):
  """A bar on a terminal; elsewhere a line a shard."""

  def __init__(self, console: Console):
    self._console = console
    self._bar = progress.Progress(
      *progress.Progress.get_default_columns(),
      progress.MofNCompleteColumn(),
      progress.TextColumn("{task.fields[rest]}"),
      console=console,
      disable=not console.is_terminal,
    )
    self._shards = self._done = self._unreadable = self._images = 0

  def __enter__(self) -> Screen:
    self._bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.stop()

  def start(self, images: int, *, shards: int, done: Iterable[packing.Note]) -> None:
    done = list(done)
    self._task = self._bar.add_task("packing", total=images, rest="")
    self._shards, self._images = shards, images
    if done:
      self._console.print(f"going on: {len(done)} of {shards} shards are finished and verified")
    for note in done:
      self._count(note)
      self._bar.advance(self._task, len(note.labels) + len(note.unreadable))

  def image(self, size: int) -> None:
    self._bar.advance(self._task)

  def shard(self, note: packing.Note) -> None:
    self._count(note)
    for name, reason in note.unreadable:
      self._console.print(f"unreadable, left out: {name}: {reason}", markup=False)
    rest = f"shard {self._done}/{self._shards}  {self._unreadable} unreadable"
    self._bar.update(self._task, rest=rest)
    if not self._console.is_terminal:
      self._console.print(rest, highlight=False)

  def _count(self, note: packing.Note) -> None:
    self._done += 1
    self._unreadable += len(note.unreadable)


def parse(argv: list[str]) -> list[str]:
  """absl's flags; what is left must be SOURCE and OUT, or OUT alone with --verify."""
  left = cli.known(argv)
  if len(left) != (2 if VERIFY.value else 3):
    wanted = "OUT" if VERIFY.value else "SOURCE and OUT"
    cli.fail(f"expected {wanted}, found {left[1:]}; usage:\n{__doc__}")
  return left


def main(argv: list[str]) -> None:
  """Packs or verifies, and says what OUT holds."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.ERROR)
  with cli.errors(ValueError, OSError):
    if VERIFY.value:
      index, done = shards.verify(argv[1]), "verified"
    else:
      index, done = _pack(argv[1], argv[2]), "packed"
  size = sum(file.bytes for file in index.files) / 2**20
  classes = f"{len(index.class_names)} classes" if index.class_names else "no labels"
  print(
    f"{argv[-1]}: {done} {index.count:,} images, {classes}, {len(index.shards)} shards, "
    f"{size:,.1f} MiB; {len(index.unreadable)} unreadable ones left out"
  )


def _pack(source: str, out: str) -> shards.Index:
  if source.startswith("tfds:"):
    name = source.removeprefix("tfds:")
    origin = origins.Tfds.open(name, split=SPLIT.value, data_dir=DATA_DIR.value, label=LABEL.value)
  else:
    origin = origins.Folder.scan(source)
  with Screen(Console(file=sys.stdout)) as screen:
    return packing.pack(
      origin,
      out,
      shard_bytes=SHARD_MB.value * 2**20,
      max_bad_fraction=MAX_BAD_FRACTION.value,
      report=screen,
    )


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
