"""The loop in one process: what a run leaves, refuses, and does when training goes wrong."""

from __future__ import annotations

import fcntl
import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from jepax import fit, sharding, summary
from jepax.checkpoint import Checkpoints
from jepax.data.build import Data
from jepax.experiment import prepare
from jepax.lock import lock
from jepax.metrics import read_history
from jepax.summary import make_probe

ENCODERS = {"target", "online", "random_init"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(workdir, results) of an I-JEPA run of ten steps on eight devices, parameters split."""
  workdir = tmp_path_factory.mktemp("run") / "work"
  config = tiny.config("ijepa", mesh__fsdp=2, accumulate=2)
  return workdir, fit.run(config, workdir, data=tiny.data())


def test_results(finished):
  workdir, results = finished
  assert json.loads((workdir / "results.json").read_text()) == results
  assert results["train"]["status"] == "finished" and results["train"]["steps"] == 10
  for probe in ("knn", "linear"):
    assert results[probe].keys() == ENCODERS | {"pixels"}
    assert all(0 <= accuracy <= 1 for accuracy in results[probe].values())
  assert results["knn"]["pixels"] > 0.9  # the bars are easy: the probe and its labels line up
  assert results["collapse"].keys() == ENCODERS
  assert 0 < results["collapse"]["target"]["ema_distance"] < 1
  assert results["alarms"] == []
  assert 0 < results["train"]["held_out_loss"] < np.inf
  assert results["predictor"]["place_chance"] == 1 / 16 and 0 <= results["predictor"]["image"] <= 1


def test_history(finished):
  rows = read_history(finished[0])
  assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 11))
  assert [row["step"] for row in rows if "knn/target" in row] == [5]
  assert [row["step"] for row in rows if "knn/random_init" in row] == [0]
  assert any(0 < row.get("collapse/target_ema_distance", 0) < 1 for row in rows)
  assert {row["collapse/alarms"] for row in rows if "knn/target" in row} == {0}
  held_out = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
  assert held_out.keys() == {0, 5} and min(held_out.values()) > 0
  last = rows[-1]
  for name in ("schedule/momentum", "schedule/learning_rate", "input/wait", "mask/context_tokens"):
    assert np.isfinite(last[name])
  for name in ("encoder/grad_norm", "predictor/param_norm", "predictor/update_norm"):
    assert 0 < last[name] < last[f"train/{name.partition('/')[2]}"]


def test_report(finished):
  page = (finished[0] / "report.html").read_text()
  for text in (
    "random init",
    "raw pixels",
    "held-out",
    "jepax.fit.run(config",
    "data:image/png;base64",
  ):
    assert text in page
  assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_a_finished_run_evaluates_again_without_training(finished):
  workdir, results = finished
  before = read_history(workdir)
  again = fit.run(tiny.config("ijepa", mesh__fsdp=2, accumulate=2), workdir, data=tiny.data())
  assert read_history(workdir) == before
  assert again["knn"] == results["knn"] and again["train"]["steps"] == 10


def test_another_run_is_refused(finished):
  config = tiny.config("ijepa", accumulate=2, optim__lr=0.5)
  with pytest.raises(ValueError, match=r"(?s)optim.lr: saved 0.001, now 0.5.*another --workdir"):
    fit.run(config, finished[0], data=tiny.data())


def test_other_arrays_are_another_run(finished):
  """The config does not say which images were handed over; their hash does."""
  x, y = tiny.images(128), tiny.labels(128)
  other = Data.from_arrays(255 - x, y, tiny.images(64, seed=1), tiny.labels(64))
  with pytest.raises(ValueError, match=r"(?s)given_data: saved .*another --workdir"):
    fit.run(tiny.config("ijepa", mesh__fsdp=2, accumulate=2), finished[0], data=other)


@pytest.fixture
def one_device(monkeypatch):
  """As on a laptop."""
  one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
  monkeypatch.setattr(sharding, "make_mesh", one)


@pytest.mark.usefixtures("one_device")
def test_early_stop_evaluates_the_best_step(tmp_path):
  config = tiny.config(
    "mae", stop__metric="train/loss", stop__mode="max", stop__patience=2, eval__every="1 steps"
  )
  results = fit.run(config, tmp_path / "run", data=tiny.data())
  losses = [row["train/loss"] for row in read_history(tmp_path / "run") if "train/loss" in row]
  stopped, best = len(losses), int(np.argmax(losses)) + 1
  assert results["train"]["status"] == "stopped" and stopped == best + 2 < 10
  with Checkpoints(tmp_path / "run" / "best") as saved:
    assert saved.latest() == best


def test_reconstructions_are_in_the_report_of_methods_that_make_them(finished, tmp_path):
  """Of parameters that are split over devices."""
  config = tiny.config("mae", mesh__fsdp=2, total="1 steps", eval__every=0)
  fit.run(config, tmp_path / "run", data=tiny.data())
  page = (tmp_path / "run" / "report.html").read_text()
  _, _, part = page.partition("<h2>Reconstructions</h2>")
  part, _, _ = part.partition("</section>")
  assert part.count('<svg class="patches"') == 8  # the visible patches of as many images
  assert part.count("<img") == 16  # the image and what was made of it
  assert "Reconstructions" not in (finished[0] / "report.html").read_text()


@pytest.mark.usefixtures("one_device")
def test_collapse_ends_a_run_that_asks_for_it(tmp_path):
  """A run that does not learn at all is alarmed at every probe."""
  still = dict(optim__lr=0.0, optim__start_lr=0.0, optim__final_lr=0.0)
  config = tiny.config("mae", stop__collapse=2, eval__every="1 steps", **still)
  results = fit.run(config, tmp_path / "run", data=tiny.data())
  assert results["train"]["status"] == "stopped" and results["train"]["steps"] == 2 < 10
  assert results["alarms"]


def test_a_loss_that_is_no_number_is_never_the_best():
  config = tiny.config("mae", stop__metric="eval/loss", stop__mode="min", stop__patience=2)
  trainer = fit.Trainer(SimpleNamespace(config=config), *[None] * 3, fit.Memory(), None)
  assert [trainer.stop_early(1, None, {"eval/loss": np.nan}) for _ in range(2)] == [False, True]
  assert trainer.memory.best is None


def test_alarms_count_in_a_row():
  config = tiny.config("mae", stop__collapse=2)
  trainer = fit.Trainer(SimpleNamespace(config=config), *[None] * 3, fit.Memory(), None)
  alarms = (1, 0, 2, 1)
  ends = [trainer.stop_early(1, None, {"collapse/alarms": count}) for count in alarms]
  assert ends == [False, False, False, True]
  config.stop.collapse = 0
  assert not trainer.stop_early(1, None, {"collapse/alarms": 1})


@pytest.mark.usefixtures("one_device")
def test_early_stop_on_the_held_out_loss(tmp_path):
  """Which a learning rate that is too high drives up again."""
  config = tiny.config(
    "mae",
    stop__metric="eval/loss",
    stop__mode="min",
    stop__patience=2,
    eval__every="1 steps",
    optim__lr=0.3,
    total="40 steps",
  )
  results = fit.run(config, tmp_path / "run", data=tiny.data())
  found = {r["step"]: r["eval/loss"] for r in read_history(tmp_path / "run") if "eval/loss" in r}
  del found[0]
  best = min(found, key=found.get)
  assert results["train"]["status"] == "stopped" and max(found) == best + 2 < 40
  with Checkpoints(tmp_path / "run" / "best") as saved:
    assert saved.latest() == best
  # The same state on the same 64 images, for the final numbers are of no more.
  assert results["train"]["held_out_loss"] == found[best]


@pytest.mark.usefixtures("one_device")
def test_an_early_stop_stays_one_until_its_rule_changes(tmp_path, monkeypatch):
  """Also where it comes before the first row of the log."""
  workdir = tmp_path / "run"
  options = dict(log__every="8 steps", eval__every="1 steps", stop__metric="train/loss")
  config = tiny.config("mae", stop__mode="max", stop__patience=1, **options)
  results = fit.run(config, workdir, data=tiny.data())
  assert results["train"]["status"] == "stopped" and results["train"]["steps"] < 8
  before = read_history(workdir)
  again = fit.run(config, workdir, data=tiny.data())
  assert read_history(workdir) == before and again["knn"] == results["knn"]
  assert again["train"] == results["train"]

  def lost(*_, **__):
    raise OSError("No space left on device")

  monkeypatch.setattr(summary, "finish", lost)
  with pytest.raises(fit.Failed, match=r"No space left .*goes on from its last checkpoint"):
    fit.run(tiny.config("mae", **options | {"stop__metric": ""}), workdir, data=tiny.data())
  assert read_history(workdir)[-1]["step"] == 10
  assert not (workdir / "results.json").exists()  # of step 1 or so, and scripts look for it


@pytest.mark.usefixtures("one_device")
def test_divergence_stops_with_the_last_good_parameters(tmp_path):
  config = tiny.config("mae", optim__lr=1e30, optim__warmup=0, max_skipped=3)
  with pytest.raises(fit.Diverged, match=r"3 updates were not finite .*Lower optim\.lr"):
    fit.run(config, tmp_path / "run", data=tiny.data())
  experiment = prepare(config, data=tiny.data())
  with Checkpoints(tmp_path / "run" / "checkpoints") as saved:
    state, _ = saved.restore(experiment.abstract_state)
  assert state.skipped[0] == 3
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.usefixtures("one_device")
def test_a_diverged_run_still_ends_with_results_and_a_report(tmp_path):
  config = tiny.config("mae", optim__lr=1e30, optim__warmup=0, total="2 steps", eval__every=0)
  fit.run(config, tmp_path / "run", data=tiny.data())
  found = json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=pytest.fail)
  assert "not finite" in found["alarms"][0]
  assert (tmp_path / "run" / "report.html").exists()


def test_one_process_a_workdir(tmp_path):
  refused = pytest.raises(ValueError, match=r"another process trains in .*another --workdir")
  with lock(tmp_path), refused, lock(tmp_path):
    pass
  with lock(tmp_path):
    pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(38, "Function not implemented")

  monkeypatch.setattr(fcntl, "flock", refuse)
  with pytest.raises(OSError, match=f"{tmp_path} can't be locked .*with locks"), lock(tmp_path):
    pass


def test_probe_of_few_images_and_of_one_class():
  config = tiny.config("mae", eval__bank=8, eval__queries=8)
  probe = make_probe(prepare(config, data=tiny.data()), final=False)
  x = np.random.default_rng(0).normal(size=(8, 4))
  assert set(probe.scores(x, x)) == {"knn", "linear"}  # 20 neighbours of 8
  one = tiny.images(32), np.zeros(32, np.int32)
  probe = make_probe(prepare(config, data=Data.from_arrays(*one, *one)), final=False)
  assert probe.scores(x, x) == {}


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"stop__metric": "knn/targt"}, "did you mean 'knn/target'"),
    ({"stop__metric": "knn/target", "stop__mode": "maximum"}, "did you mean 'max'"),
    ({"stop__metric": "knn/target", "eval__every": 0}, "eval.every"),
    ({"stop__metric": "eval/loss"}, "set stop.mode='min'"),
    ({"batch_size": 20}, r"batch_size=20 does not divide over 8 device\(s\).*\[16, 24\]"),
    ({"batch_size": 136}, "exceeds the 128 training images"),
    ({"optim__warmup": "11 steps"}, "is 11 steps but the run only 10"),
    ({"total": "0 steps"}, "no step at all"),
    ({"mesh__fsdp": 3}, "does not fit 8 device"),
    ({"method__encoder__patch": 3}, "patches that do"),
    ({"total": "3e9 steps"}, "3000000000 steps; at most 2147483647"),
    ({"seed": 2**32}, "seed=4294967296 must lie in 0"),
    ({"checkpoint__keep": 0}, "checkpoint.keep=0 must be positive"),
    ({"stop__patience": 0}, "stop.patience=0 must be positive"),
    ({"stop__collapse": -1}, "stop.collapse=-1 must not be negative"),
    ({"stop__collapse": 2, "eval__every": 0}, "judged at the probes: set eval.every"),
    ({"eval__final_bank": 1}, "eval.final_bank=1 must be at least 2"),
  ],
)
def test_impossible_settings_write_nothing(tmp_path, overrides, message):
  with pytest.raises(ValueError, match=message):
    fit.run(tiny.config("ijepa", **overrides), tmp_path / "run", data=tiny.data())
  assert not (tmp_path / "run").exists()
