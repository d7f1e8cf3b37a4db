"""The command line: one clear line for a mistake, nothing written, exit status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import quick
from absl.testing import flagsaver

from jepax import cli, fit, main

ROOT = Path(__file__).parent.parent
QUICKSTART = "--config=configs/quickstart.py:smoke"


MISTAKES = [
  ([QUICKSTART, "--config.optim.lrr=1"], "did you mean 'optim.lr'"),
  ([QUICKSTART, "--config.batch_size=ten"], "found 'ten', expected"),
  (["--config=configs/quickstrat.py"], "did you mean 'quickstart.py'"),
  ([QUICKSTART, "--config.data.source=tfds", "--config.data.path=nowhere"], "nowhere"),
  ([QUICKSTART, "--config.data.source=folder", "--config.data.path=nowhere"], "nowhere"),
]


@pytest.fixture
def start(capfd, monkeypatch):
  """Arguments -> the exit status and what was written to stderr; in this process."""

  def call(*arguments: str) -> tuple[int, str]:
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
      main.main(cli.parse(["jepax.main", *arguments], prefix="--config."))
    return ended.value.code, capfd.readouterr().err

  monkeypatch.chdir(ROOT)
  return call


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(start, tmp_path, arguments, message):
  status, error = start(*arguments, f"--workdir={tmp_path / 'run'}")
  assert status == 2
  assert message in error
  assert "Traceback" not in error and len(error) < 2000  # one screen
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "argument", ["--confg=x.py", "stray", "--workdir", "--heartbeat_timeout=soon"]
)
def test_unknown_flags(start, argument):
  status, error = start(QUICKSTART, argument)
  assert status == 2
  assert "Traceback" not in error
  assert argument.lstrip("-").partition("=")[0] in error  # what was wrong is named


@pytest.mark.parametrize(
  ("arguments", "status", "message"),
  [(MISTAKES[0][0], 2, MISTAKES[0][1]), ([QUICKSTART, "--confg=x.py"], 2, "confg")],
)
def test_mistakes_of_a_process(arguments, status, message):
  done = subprocess.run(
    [sys.executable, "-m", "jepax.main", *arguments],
    cwd=ROOT,
    env=os.environ | quick.ENVIRONMENT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == status
  assert message in done.stderr
  assert "Traceback" not in done.stderr and len(done.stderr) < 2000


def test_storage_that_fails_under_way_is_no_mistake(start, monkeypatch, tmp_path):
  """A scheduler starts again what ends with 1, and gives up on 2."""

  def fail(*_, **__):
    with fit.under_way():
      raise OSError(5, "Input/output error")

  monkeypatch.setattr(fit, "run", fail)
  status, error = start(QUICKSTART, f"--workdir={tmp_path / 'run'}")
  assert status == 1 and "Input/output error; the run goes on from its last checkpoint" in error


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
