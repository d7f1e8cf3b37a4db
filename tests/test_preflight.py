"""A dry run: what it finds is what the run would do, its faults are the run's, it writes nothing."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from jepax import fit, preflight
from jepax.data.build import Data
from jepax.lock import lock

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).parent.parent


def config(method: str = "ijepa", **overrides):
  return tiny.config(method, mesh__fsdp=2, **overrides)


def snapshot(folder: Path) -> dict[Path, tuple]:
  """All below a folder: time of the last change, and size."""
  return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> preflight.Findings:
  """Of a new run."""
  workdir = tmp_path_factory.mktemp("new") / "runs" / "work"
  findings = preflight.run(config(), workdir, data=tiny.data())
  assert not workdir.parent.exists()
  return findings


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
  """The workdir of a run of ten steps, saved at 5 and 10."""
  workdir = tmp_path_factory.mktemp("finished") / "work"
  fit.run(config(eval__every=0, eval__final_bank=2, eval__final_queries=2), workdir, data=few())
  return workdir


@pytest.fixture
def stopped(finished, tmp_path) -> Path:
  """The same run before its last checkpoint."""
  workdir = tmp_path / "work"
  shutil.copytree(finished, workdir)
  shutil.rmtree(workdir / "checkpoints" / "10")
  return workdir


def few() -> Data:
  """The tiny data without labels, which final probes would need time for."""
  return Data.from_arrays(tiny.images(128), None, tiny.images(64, seed=1))


def test_a_new_run(found):
  state = found.experiment.initial_state()
  leaves = jax.tree.leaves(state)
  assert found.position == 0
  assert found.parameters == sum(x.size for x in jax.tree.leaves(state.params))
  assert found.checkpoint_bytes == sum(x.nbytes for x in leaves)
  parts = {"parameters": state.params, "carry": state.carry, "optimizer": state.opt_state}
  assert found.state_bytes == {
    name: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    for name, tree in parts.items()
  }
  assert found.state_bytes["parameters"] < 4 * found.parameters  # split over fsdp
  assert found.step_memory["arguments"] >= sum(found.state_bytes.values())
  assert found.step_memory["temporaries"] > 0
  assert np.isfinite(found.loss) and found.loss > 0


def test_what_moved(found):
  trees = {
    "parameters": found.experiment.abstract_state.params,
    "target encoder": found.experiment.abstract_state.carry["target"],
  }
  assert found.moved.keys() == {"parameters", "online encoder", "target encoder", "optimizer"}
  for name, tree in trees.items():
    assert found.moved[name] == (len(jax.tree.leaves(tree)),) * 2
  count, leaves = found.moved["optimizer"]
  assert count == leaves == 2 * len(jax.tree.leaves(trees["parameters"]))  # Adam's two moments


def test_estimates(found):
  for name in ("compile_seconds", "step_seconds", "input_seconds", "probe_seconds"):
    assert 0 < getattr(found, name) < 300
  starved = dataclasses.replace(found, step_seconds=2.0, input_seconds=3.0, position=4)
  assert starved.input_share == 1.5
  assert starved.train_seconds == 6 * 3.0  # of ten steps, four are done
  assert dataclasses.replace(starved, input_seconds=1.0).train_seconds == 6 * 2.0


def test_the_table(found, capsys):
  big = dataclasses.replace(
    found,
    step_seconds=0.5,
    input_seconds=0.75,
    state_bytes={"parameters": 2_000_000_000, "carry": 0},
    device_bytes=16_000_000_000,
  )
  preflight.show(big)
  lines = capsys.readouterr().out.splitlines()
  rows = {line.split()[0]: line for line in lines}
  assert "mesh data 4 x fsdp 2" in rows["devices"]
  assert "10 steps of 16 images, 1.2 epochs of 128" in rows["run"]
  assert "2 GB a device: parameters 2 GB, carry 0 B" in rows["state"]
  assert "a device has 16 GB" in rows["memory"]
  assert "0.5 s, 32 images/s" in rows["step"]
  assert "150% of a step (training would wait)" in rows["input"]
  assert "a new run" in rows["workdir"]
  assert "7.5 seconds" in rows["estimate"]
  assert "nothing was written" in lines[-1]


def test_the_batch_is_the_run_s(found):
  batch, _ = preflight.read_batch(found.experiment, 3)
  with found.experiment.loader(start=3) as loader:
    np.testing.assert_array_equal(batch["image"], next(loader)["image"])
  assert batch["image"].sharding == found.experiment.batch_sharding


def test_a_method_without_target(tmp_path):
  found = preflight.run(config("mae"), tmp_path, data=tiny.data())
  branch = found.experiment.method.branches[0]
  assert found.moved.keys() == {"parameters", f"{branch} encoder", "optimizer"}
  assert not any(tmp_path.iterdir())


def test_a_run_that_goes_on(stopped, capsys):
  before = snapshot(stopped)
  found = preflight.run(config(eval__every=0), stopped, data=few())
  assert snapshot(stopped) == before
  assert found.position == 5
  preflight.show(found)
  assert "goes on from step 5" in capsys.readouterr().out


def test_a_run_that_is_finished(finished, capsys):
  before = snapshot(finished)
  found = preflight.run(config(eval__every=0), finished, data=few())
  assert snapshot(finished) == before
  assert found.position == 10 and found.train_seconds == 0
  preflight.show(found)
  assert "finished at step 10" in capsys.readouterr().out


def another_run(workdir: Path) -> dict:
  return {"optim__lr": 0.5}


def no_metrics(workdir: Path) -> dict:
  (workdir / "metrics.jsonl").unlink()
  return {}


def a_damaged_checkpoint(workdir: Path) -> dict:
  for path in (workdir / "checkpoints" / "5" / "state").rglob("*"):
    if path.is_file() and path.name not in ("_METADATA", "_CHECKPOINT_METADATA"):
      path.unlink()
  return {}


def files_of_something_else(workdir: Path) -> dict:
  (workdir / "config.json").unlink()
  return {}


def a_file(workdir: Path) -> dict:
  shutil.rmtree(workdir)
  workdir.touch()
  return {}


def below_a_file(workdir: Path) -> dict:
  shutil.rmtree(workdir.parent)
  workdir.parent.touch()
  return {}


def a_batch_that_does_not_divide(workdir: Path) -> dict:
  return {"batch_size": 12}


FAULTS = (
  another_run,
  no_metrics,
  a_damaged_checkpoint,
  files_of_something_else,
  a_file,
  below_a_file,
  a_batch_that_does_not_divide,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_are_the_run_s(stopped, fault):
  faulty = config(**({"eval__every": 0} | fault(stopped)))
  with pytest.raises((ValueError, OSError)) as dry:
    preflight.run(faulty, stopped, data=few())
  with pytest.raises((ValueError, OSError)) as real:
    fit.run(faulty, stopped, data=few())
  assert type(dry.value) is type(real.value) and str(dry.value) == str(real.value)


@pytest.mark.parametrize("start", [preflight.run, fit.run], ids=["dry", "real"])
@pytest.mark.parametrize("url", ["gs://bucket/run", Path("gs://bucket/run"), "s3://b/run"])
def test_a_url_is_no_workdir(tmp_path, monkeypatch, start, url):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="is no path of a file system"):
    start(config(), url, data=tiny.data())
  assert not any(tmp_path.iterdir())  # no folder named 'gs:'


def test_a_workdir_in_use(stopped):
  with lock(stopped), pytest.raises(ValueError, match="another process trains"):
    preflight.run(config(eval__every=0), stopped, data=few())


def test_a_disk_that_is_full_or_closed(found, tmp_path, monkeypatch):
  experiment, workdir = found.experiment, tmp_path / "work"
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=999))
  assert preflight.look_at(experiment, workdir, 999) == 999
  with pytest.raises(OSError, match="No space left on device for a checkpoint of 1 kB"):
    preflight.look_at(experiment, workdir, 1000)
  monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
  with pytest.raises(PermissionError, match=str(workdir)):
    preflight.look_at(experiment, workdir, 999)


def test_a_loss_that_is_not_finite(tmp_path):
  data = Data.from_arrays(tiny.images(128), None, tiny.images(64), std=(1e-40,))
  with pytest.raises(fit.Diverged, match=r"update 1 is not finite: loss nan.*data\.std"):
    preflight.run(config(), tmp_path / "work", data=data)


@pytest.mark.parametrize(
  ("overrides", "still"),
  [
    ({"optim__lr": 0.0, "optim__final_lr": 0.0}, "online encoder, parameters, target encoder"),
    ({"method__momentum": (1.0, 1.0)}, "target encoder"),
  ],
)
def test_what_does_not_learn_is_named(tmp_path, overrides, still):
  with pytest.raises(ValueError, match=rf"changed nothing in: {still}\. Check"):
    preflight.run(config(**overrides), tmp_path / "work", data=tiny.data())


def test_a_step_that_does_not_fit():
  with pytest.raises(
    ValueError, match=r"does not fit the device: RESOURCE_EXHAUSTED: .*mesh\.fsdp"
  ):
    with preflight._fits():
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\n allocating 9G")
  with pytest.raises(jax.errors.JaxRuntimeError), preflight._fits():
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_command_line(tmp_path):
  command = [sys.executable, "-m", "jepax.main", "--config=configs/quickstart.py:smoke"]
  environment = os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  done = subprocess.run(
    [*command, f"--workdir={tmp_path / 'run'}", "--dry_run"],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  assert "4 steps of 16 images" in done.stdout and "nothing was written" in done.stdout
  assert not any(tmp_path.iterdir())
