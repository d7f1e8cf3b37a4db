"""A dry run finds what the run would do and fails as it would; it writes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import quick
import tiny

from jepax import fit, preflight
from jepax.checkpoint import Checkpoints, guard
from jepax.experiment import prepare
from jepax.lock import lock

ROOT = Path(__file__).parent.parent


def config(method: str = "ijepa", **overrides):
  return tiny.config(method, mesh__fsdp=2, **overrides)


def snapshot(folder: Path) -> dict[Path, tuple]:
  """All below a folder: time of the last change, and size."""
  return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def save(experiment, workdir: Path, *, step: int) -> None:
  """Leaves what a run leaves that was stopped at a step."""
  state = experiment.initial_state().replace(step=jax.numpy.int32(step))
  guard(workdir, fit.identity(experiment), ignore=fit.FREE_KEYS)
  with lock(workdir), Checkpoints(workdir / "checkpoints", every=1, keep=1) as saved:
    memory = dataclasses.asdict(fit.Memory(position=step))
    saved.save(step, state, meta={"memory": memory}, force=True)
  (workdir / "metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> preflight.Findings:
  """Of a run that was stopped at step 5 of 10."""
  workdir = tmp_path_factory.mktemp("found")
  save(prepare(config(), data=tiny.data()), workdir, step=5)
  before = snapshot(workdir)
  findings = preflight.run(config(), workdir, data=tiny.data())
  assert snapshot(workdir) == before
  return findings


@pytest.fixture
def stopped(found, tmp_path) -> Path:
  """A copy of its workdir."""
  shutil.copytree(found.workdir, tmp_path / "work")
  return tmp_path / "work"


def test_what_is_found(found):
  state = found.experiment.initial_state()
  leaves = jax.tree.leaves(state)
  assert found.position == 5
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
  assert np.isfinite(found.metrics["train/loss"]) and found.metrics["train/loss"] > 0
  assert 0 < found.held_out_loss < np.inf


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
  assert f"encoder/grad_norm {found.metrics['encoder/grad_norm']:.3g}, " in rows["metrics"]
  assert "mask/context_tokens " in rows["metrics"]
  assert "150% of a step (training would wait)" in rows["input"]
  assert "goes on from step 5" in rows["workdir"]
  assert "3.8 seconds" in rows["estimate"]
  assert "nothing was written" in lines[-1]


def test_the_batch_is_the_run_s(found):
  batch, _ = preflight.read_batch(found.experiment, 3)
  with found.experiment.loader(start=3) as loader:
    np.testing.assert_array_equal(batch["image"], next(loader)["image"])
  assert batch["image"].sharding == found.experiment.batch_sharding


@pytest.mark.parametrize("method", tiny.METHODS)
def test_every_method_is_watched(method):
  experiment = tiny.experiment(method)
  watched = jax.eval_shape(preflight._fingerprints(experiment), experiment.abstract_state)
  encoders = {f"{branch} encoder" for branch in experiment.method.branches}
  assert watched.keys() == encoders | {"parameters", "optimizer"}
  assert watched["parameters"].shape == (len(jax.tree.leaves(experiment.abstract_state.params)),)


def test_a_run_that_is_finished(found, tmp_path, capsys):
  save(found.experiment, tmp_path, step=10)
  state, position = preflight.restore(found.experiment, tmp_path)
  assert position == 10 and state.step == 0  # its last step has no rate left to move anything
  preflight.show(dataclasses.replace(found, position=10))
  assert "finished at step 10" in capsys.readouterr().out


def another_run(workdir: Path) -> dict:
  return {"optim__lr": 0.5}


def no_metrics(workdir: Path) -> dict:
  (workdir / "metrics.jsonl").unlink()
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
  files_of_something_else,
  a_file,
  below_a_file,
  a_batch_that_does_not_divide,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_are_the_run_s(stopped, fault):
  faulty = config(**fault(stopped))
  with pytest.raises((ValueError, OSError)) as dry:
    preflight.run(faulty, stopped, data=tiny.data())
  with pytest.raises((ValueError, OSError)) as real:
    fit.run(faulty, stopped, data=tiny.data())
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
    preflight.run(config(), stopped, data=tiny.data())


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


@pytest.mark.parametrize("bad", ["nothing moves", "the parameters alone", "not finite"])
def test_steps_that_go_wrong(found, bad):
  def step(state, batch):
    params = state.params
    if bad == "the parameters alone":
      params = jax.tree.map(lambda x: x + 1, params)
    skipped = float(bad == "not finite")
    names = ("train/skipped_in_a_row", "train/loss", "train/grad_norm")
    return state.replace(step=state.step + 1, params=params), dict.fromkeys(names, skipped)

  state = found.experiment.initial_state()
  message = {
    "nothing moves": "nothing in: online encoder, optimizer, parameters, target encoder. Check",
    "the parameters alone": "nothing in: optimizer, target encoder. Check",
    "not finite": "update 1 is not finite: loss 1, norm of the gradient 1. Check data.mean",
  }[bad]
  error = fit.Diverged if bad == "not finite" else ValueError
  with pytest.raises(error, match=re.escape(message)):
    preflight.take_steps(found.experiment, step, state, {})


def test_a_frozen_encoder_may_stay_and_nothing_else(found):
  experiment = found.experiment
  config = experiment.config.copy_and_resolve_references()
  with config.unlocked():
    config.optim.frozen = "encoder"
  experiment = dataclasses.replace(experiment, config=config)

  def step(state, batch):
    names = ("train/skipped_in_a_row", "train/loss", "train/grad_norm")
    return state.replace(step=state.step + 1), dict.fromkeys(names, 0.0)

  with pytest.raises(ValueError, match=r"nothing in: optimizer, parameters\. Check"):
    preflight.take_steps(experiment, step, experiment.initial_state(), {})


def test_a_step_that_does_not_fit():
  message = r"does not fit the device: RESOURCE_EXHAUSTED: .*mesh\.fsdp"
  with pytest.raises(ValueError, match=message), preflight._fits():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\n allocating 9G")
  with pytest.raises(jax.errors.JaxRuntimeError), preflight._fits():
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_command_line(tmp_path):
  command = [sys.executable, "-m", "jepax.main", "--config=configs/quickstart.py:smoke"]
  environment = os.environ | quick.ENVIRONMENT
  done = subprocess.run(
    [*command, f"--workdir={tmp_path / 'run'}", "--dry_run"],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  for text in ("4 steps of 16 images", "a new run", "nothing was written"):
    assert text in done.stdout
  assert not any(tmp_path.iterdir())
