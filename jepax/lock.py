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
      "s3fs) or use a shared file system, and give that path; see launch/README.md."
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
    taken = f"another process trains in {workdir}; wait for it, stop it, or give another --workdir"
    claim(file.fileno(), workdir, taken=taken)
    yield


def claim(descriptor: int, path: Path, *, taken: str) -> None:
  """Locks an open file or directory until it is closed.

  Args:
    descriptor: of the file. path: of the directory meant, for errors.
    taken: the error where another process holds it.

  Raises:
    ValueError: it is taken.
    OSError: the file system has no locks.
  """
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise ValueError(taken) from None
  except OSError as error:
    raise OSError(
      f"{path} can't be locked ({error}); mount its file system with locks (Lustre: -o flock), or "
      "take another"
    ) from error
