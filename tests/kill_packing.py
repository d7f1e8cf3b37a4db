"""Packs a folder over and over, killed with SIGKILL at one moment after the other; prints JSON.

  python tests/kill_packing.py IMAGES OUT

Killed children pack into OUT/0, OUT/1, ...; each is then packed to its end by another process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from jepax.data import origins, packing, shards

SHARD_BYTES = 2500


def killed_at(moment: int, out: Path, origin: origins.Folder) -> bool:
  """Packs in a child that dies before its moment-th write, flush or renaming; whether it died."""
  child = os.fork()
  if child:
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
  left = iter(range(moment, -1, -1))

  def dying(function):
    def call(*args):
      if next(left) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
      return function(*args)

    return call

  class Writer(packing.ArrayRecordWriter):
    write = dying(packing.ArrayRecordWriter.write)

  packing.ArrayRecordWriter = Writer
  os.replace, os.fsync = dying(os.replace), dying(os.fsync)
  packing.pack(origin, out, shard_bytes=SHARD_BYTES, threads=1)
  os._exit(0)


def finish(out: Path, origin: origins.Folder) -> None:
  """Packs what is left, in a process of its own, since threads and forks do not mix."""
  child = os.fork()
  if not child:
    packing.pack(origin, out, shard_bytes=SHARD_BYTES, threads=1)
    os._exit(0)
  assert os.waitpid(child, 0)[1] == 0


def written(out: Path) -> dict[str, tuple[int, str]]:
  """Shards by name: when they were written, and their sha256."""
  paths = sorted(out.glob("shard-*"))
  return {path.name: (path.stat().st_mtime_ns, shards.sha256(path)) for path in paths}


def main() -> None:
  origin, out = origins.Folder.scan(sys.argv[1]), Path(sys.argv[2])
  found = []
  for moment in range(1000):
    place = out / str(moment)
    died = killed_at(moment, place, origin)
    notes = [json.loads(path.read_text()) for path in place.glob(".packing/0*.json")]
    row = {"died": died, "packed": shards.is_packed(place), "before": written(place)}
    row["finished"] = [note["file"]["name"] for note in notes]
    finish(place, origin)
    index = (place / shards.INDEX).read_text()
    found.append({**row, "after": written(place), "index": index})
    found[-1]["left"] = sorted(path.name for path in place.iterdir())
    if not died:
      break
  print(json.dumps(found))


if __name__ == "__main__":
  main()
