"""The command line: one clear line for a mistake, nothing written, exit status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import quick

from jepax import main

ROOT = Path(__file__).parent.parent
QUICKSTART = "--config=configs/quickstart.py:smoke"


def start(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "jepax.main", *arguments]
  environment = os.environ | quick.ENVIRONMENT
  return subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
  )


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([QUICKSTART, "--config.optim.lrr=1"], "did you mean 'optim.lr'"),
    ([QUICKSTART, "--config.batch_size=ten"], "found 'ten', expected"),
    (["--config=configs/quickstrat.py"], "did you mean 'quickstart.py'"),
    ([QUICKSTART, "--config.data.source=tfds", "--config.data.path=nowhere"], "nowhere"),
    ([QUICKSTART, "--config.data.source=folder", "--config.data.path=nowhere"], "nowhere"),
  ],
)
def test_mistakes(tmp_path, arguments, message):
  done = start(*arguments, f"--workdir={tmp_path / 'run'}")
  assert done.returncode == 2
  assert message in done.stderr
  assert "Traceback" not in done.stderr and len(done.stderr) < 2000  # one screen
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argument", ["--confg=x.py", "stray", "--workdir"])
def test_unknown_flags(argument):
  done = start(QUICKSTART, argument)
  assert done.returncode != 0
  assert "Traceback" not in done.stderr
  assert argument.lstrip("-").partition("=")[0] in done.stderr  # what was wrong is named


@pytest.mark.parametrize(
  ("backend", "told", "expected"),
  [("tpu", None, "run/programs"), ("gpu", "/mine", "/mine"), ("cpu", None, None)],
)
def test_programs_are_kept_for_a_restart(monkeypatch, backend, told, expected):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  try:
    jax.config.update("jax_compilation_cache_dir", told)
    main.keep_programs(Path("run"))
    assert jax.config.jax_compilation_cache_dir == expected
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


def test_default_workdir_names_the_config():
  assert main.default_workdir("configs/quickstart.py") == "runs/quickstart"
  assert main.default_workdir("configs/quickstart.py:smoke") == "runs/quickstart-smoke"
