"""Where JAX computes on a CPU: the program's memory on huge pages.

A compiled step takes its temporaries from the C library in one piece and returns it at the end. For
so large a piece glibc asks the kernel, which has to find and clear every page of it in every step.
Of 4 KiB those are 107,000 pages for ViT-S/16 with four images, and a sixth of the step's time goes
there and into the elementwise operations that touch them first; of 2 MiB it is 500.

glibc reads this setting where a program starts, so a program that wants it starts itself again.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

_SETTING = "GLIBC_TUNABLES"
_LIBRARY = "CS_GNU_LIBC_VERSION"  # of confstr(3)
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment() -> dict[str, str]:
  """Environment variables to start a program with; none where they are of no use.

  Of use: glibc from 2.35 on, a kernel that gives huge pages to those who ask ('madvise', the common
  choice), JAX on a CPU. What the user has set of glibc's tunables stays as it is.
  """
  if _SETTING in os.environ or not _computes_on_cpu() or not _glibc_asks():
    return {}
  on_demand = _KERNEL.is_file() and "[madvise]" in _KERNEL.read_text()
  return {_SETTING: "glibc.malloc.hugetlb=1"} if on_demand else {}


def restart_with() -> None:
  """Starts this program again, in the same process, if `environment` has something for it."""
  added = environment()
  if added:
    sys.stdout.flush()
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | added)


def _glibc_asks() -> bool:
  """Whether the C library is a glibc that has the tunable."""
  if _LIBRARY not in getattr(os, "confstr_names", ()):
    return False
  library, _, version = (os.confstr(_LIBRARY) or "").partition(" ")  # 'glibc 2.36'
  return library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)


def _computes_on_cpu() -> bool:
  """What JAX will choose, as far as it can be said before JAX is there."""
  chosen = os.environ.get("JAX_PLATFORMS")
  if chosen:
    return chosen == "cpu"
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  return not plugins and importlib.util.find_spec("libtpu") is None
