"""A run that is killed or asked to stop, and goes on, ends at the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import quick
import tiny

from jepax.checkpoint import Checkpoints
from jepax.experiment import prepare
from jepax.metrics import read_history

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
  """A compilation cache, so that only the first of the processes compiles."""
  return tmp_path_factory.mktemp("cache")


def start(method: str, workdir: Path, cache: Path, *rest: str) -> subprocess.CompletedProcess:
  environment = os.environ | {
    **quick.ENVIRONMENT,
    "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {quick.XLA_FLAGS}",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": str(HERE.parent),
  }
  command = [sys.executable, str(HERE / "run_tiny.py"), method, str(workdir), *rest]
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def final_state(method: str, workdir: Path) -> dict[str, np.ndarray]:
  """All arrays saved at step 40, by path."""
  config = tiny.config(method, total="40 steps", checkpoint__every="10 steps", eval__every=0)
  abstract = prepare(config, data=tiny.data()).abstract_state
  with Checkpoints(workdir / "checkpoints") as saved:
    assert saved.latest() == 40
    state, meta = saved.restore(abstract)
  assert meta["memory"]["position"] == 40
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  done = start("ijepa", workdir, cache)
  assert done.returncode == 0, done.stderr
  return final_state("ijepa", workdir)


@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_interrupted_run_ends_at_the_same_bits(tmp_path, cache, uninterrupted, number):
  workdir = tmp_path / "run"
  broken = start("ijepa", workdir, cache, "25", number)
  if number == "SIGKILL":
    assert broken.returncode == -9
  else:  # saved where it was, and ended well
    assert broken.returncode == 0, broken.stderr
    assert broken.stdout.split()[-1] == "preempted"
    with Checkpoints(workdir / "checkpoints") as saved:
      assert saved.latest() == 25
  resumed = start("ijepa", workdir, cache)
  assert resumed.returncode == 0, resumed.stderr
  state = final_state("ijepa", workdir)
  assert state.keys() == uninterrupted.keys()
  for path, leaf in state.items():
    np.testing.assert_array_equal(leaf, uninterrupted[path], err_msg=path)
  steps = [row["step"] for row in read_history(workdir) if "train/loss" in row]
  assert steps == list(range(1, 41))  # logged every step, none twice
