"""One run a workdir, and one file system for all its processes to see."""

from __future__ import annotations

import contextlib
import fcntl
import re
from collections.abc import Iterator
from pathlib import Path


def local_path(workdir: str | Path) -> Path:
  """The absolute path of a run's directory.

  Raises:
    ValueError: a URL, which would become a folder named 'gs:' on this machine's own disk.
  """
  if re.match(r"[a-z0-9]+:/", str(workdir)):  # Path makes one slash of two
    raise ValueError(
      f"workdir {str(workdir)!r} is no path of a file system. Mount the bucket (gcsfuse, "
      "s3fs, mountpoint-s3) or use a shared file system, and give that path; see launch/README.md."
    )
  return Path(workdir).expanduser().absolute()


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
  """Keeps other runs on this machine from training in a directory; a kill frees it.

  Of the processes of one run, the first alone holds it.

  Raises:
    ValueError: another process trains there.
  """
  with open(workdir / ".lock", "a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(
        f"another process trains in {workdir}; wait for it, stop it, or give another --workdir"
      ) from None
    yield
