"""A program on a CPU starts with huge pages, once, and only where they can be had."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest

from jepax import huge_pages

SETTING = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

# Says at each start which process it is, and at last with what it goes on.
PROGRAM = """
import os, sys
from jepax import huge_pages
print("started", os.getpid())
setting = {} if "GLIBC_TUNABLES" in os.environ else {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
huge_pages.environment = lambda: setting
huge_pages.restart_with()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:], sys.flags.utf8_mode)
"""


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """A function that sets up a machine; without arguments one with all that is needed."""

  def describe(*, libc="glibc 2.36", kernel="always [madvise] never", platforms="cpu", plugins=()):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    names = {} if libc is None else {"CS_GNU_LIBC_VERSION": 2}
    monkeypatch.setattr(os, "confstr_names", names, raising=False)
    monkeypatch.setattr(os, "confstr", lambda name: libc, raising=False)
    monkeypatch.setattr(huge_pages, "_KERNEL", tmp_path / "enabled")
    if kernel is not None:
      (tmp_path / "enabled").write_text(kernel + "\n")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(huge_pages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)

  return describe


@pytest.mark.parametrize("libc", ["glibc 2.35", "glibc 2.36", "glibc 3.0.1"])
@pytest.mark.parametrize("platforms", ["cpu", ""])
def test_asked_for_on_a_cpu(machine, libc, platforms):
  machine(libc=libc, platforms=platforms)
  assert huge_pages.environment() == SETTING


@pytest.mark.parametrize(
  "found",
  [
    {"libc": "glibc 2.34"},
    {"libc": None},  # musl
    {"kernel": "[always] madvise never"},  # they are there anyway
    {"kernel": "always madvise [never]"},
    {"kernel": None},
    {"platforms": "cuda"},
    {"platforms": "tpu,cpu"},
    {"platforms": "", "plugins": ["jax_plugins.xla_cuda13"]},
  ],
)
def test_not_asked_for_elsewhere(machine, found):
  machine(**found)
  assert huge_pages.environment() == {}


def test_not_asked_for_beside_a_tpu(machine, monkeypatch):
  machine(platforms="")
  monkeypatch.setattr(huge_pages.importlib.util, "find_spec", lambda name: name == "libtpu")
  assert huge_pages.environment() == {}


def test_the_users_tunables_stay(machine, monkeypatch):
  machine()
  monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=3")
  assert huge_pages.environment() == {}


def test_a_program_starts_again_once_with_its_arguments(tmp_path):
  """As the same process."""
  path = tmp_path / "program.py"
  path.write_text(PROGRAM)
  environment = {k: v for k, v in os.environ.items() if k not in SETTING}
  environment["PYTHONPATH"] = os.pathsep.join(sys.path)
  command = [sys.executable, "-X", "utf8", str(path), "--one", "two words"]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  first, second, last = done.stdout.splitlines()
  assert first == second
  assert last == "glibc.malloc.hugetlb=1 ['--one', 'two words'] 1"
