"""One run a workdir."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
  """Keeps other runs on this machine from training in a directory; a kill frees it.

  Of the processes of one run, the first alone holds it.

  Raises:
    ValueError: another process trains there.
  """
  with open(workdir / ".lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(
        f"another process trains in {workdir}; wait for it, stop it, or give another --workdir"
      ) from None
    yield
