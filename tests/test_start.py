"""Starting from weights: which leaf takes what, what is refused, and a run from step 0 on."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import jepax.pretrained
from jepax import fit, preflight, summary
from jepax.checkpoint import Checkpoints
from jepax.convert import source
from jepax.convert.weights import flatten, stacked, unflatten
from jepax.data.build import Data
from jepax.experiment import Experiment, prepare
from jepax.metrics import read_history
from jepax.planning import plan, targets
from jepax.start import Start, places, read_start

NOWHERE = Path("there/is/no/run")
RESNET = dict(variant="resnet18", stem="cifar", width=16, depths=(1, 1))
GRAM = dict(weight=1.0, start=0.5, every=0.5, copies=1)


def filled(experiment: Experiment, seed: int):
  """A state of random numbers, placed as a run's; nothing compiles."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jax.device_put((0.2 * rng.normal(size=x.shape)).astype(x.dtype), x.sharding),
    experiment.abstract_state,
  )


def save(experiment: Experiment, workdir: Path, *, seed: int = 0):
  """Leaves a run's checkpoint of step 10, of random numbers; returns its state."""
  state = filled(experiment, seed)
  with Checkpoints(workdir / "checkpoints", every=10, keep=1) as saved:
    trainer = fit.Trainer(experiment, None, saved, None, fit.Memory(position=10), workdir)
    saved.save(10, state, meta=trainer.meta())
  return state


def asking(experiment: Experiment, weights: object, **init: str) -> Experiment:
  """The same run, started from weights."""
  config = experiment.config.copy_and_resolve_references()
  with config.unlocked():
    config.init.update(weights=str(weights), **init)
  return dataclasses.replace(experiment, config=config)


def prepared(method: str = "ijepa", weights: object = "", *, data: Data | None = None, **overrides):
  return prepare(tiny.config(method, init__weights=str(weights), **overrides), data=data or DATA)


DATA = tiny.data()


def begin(experiment: Experiment) -> tuple[Start, object, object]:
  """The weights a run starts from, and its state before and after."""
  start = read_start(experiment, NOWHERE)
  before = filled(experiment, 1)
  return start, before, start.into(before)


def encoders(experiment: Experiment, state) -> dict[str, dict[str, np.ndarray]]:
  """Branch -> weights, blocks not stacked."""
  method = experiment.method
  return {
    branch: flatten(method.weights(state.params, state.carry, branch=branch))
    for branch in method.branches
  }


def same(found: dict, wanted: dict) -> None:
  assert found.keys() == wanted.keys()
  for path, x in wanted.items():
    np.testing.assert_array_equal(found[path], x, err_msg=path)


def changed(before, after) -> set[str]:
  """Leaves of a state that differ."""
  flat = zip(*(jax.tree_util.tree_leaves_with_path(x) for x in (before, after)), strict=True)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
  return {name(path) for (path, x), (_, y) in flat if not np.array_equal(x, y)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(workdir, experiment, state) of an I-JEPA run whose blocks are stacked."""
  workdir = tmp_path_factory.mktemp("source")
  experiment = prepared(method__encoder__scan=True)
  return workdir, experiment, save(experiment, workdir)


# --- which leaf takes what ------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(tiny.METHODS))
def test_every_copy_of_the_encoder_is_replaced(method, tmp_path):
  """Each branch from that of its name, to the bit; heads, optimizer and counters stay."""
  experiment = tiny.experiment(method)
  state = save(experiment, tmp_path)
  start, before, after = begin(asking(experiment, tmp_path))
  for branch, weights in encoders(experiment, state).items():
    same(encoders(experiment, after)[branch], weights)
    assert f"{branch} encoder from '{branch}'" in start.text
  moved = {p for found in places(experiment.method, state).values() for p in found.values()}
  if method == "ijepa":
    moved |= {p for p in changed(before, after) if p.startswith("params/predictor/")}
    same(flatten(after.params["predictor"]), flatten(state.params["predictor"]))
    assert "predictor too" in start.text
  assert changed(before, after) == moved
  assert not start.values  # the host keeps nothing


def test_running_statistics_go_with_their_branch(tmp_path):
  experiment = prepared("byol", method__encoder=RESNET)
  state = save(experiment, tmp_path)
  _, _, after = begin(asking(experiment, tmp_path))
  for branch, weights in encoders(experiment, state).items():
    assert any(path.startswith("statistics/") for path in weights)
    same(encoders(experiment, after)[branch], weights)


def test_a_copy_that_no_branch_is(tmp_path):
  """The Gram teacher of DINOv2 starts as its teacher."""
  experiment = prepared("dinov2", method__gram=GRAM)
  save(experiment, tmp_path)
  _, _, after = begin(asking(experiment, tmp_path))
  same(flatten(after.carry["gram"]), flatten(after.carry["target"]["encoder"]))


@pytest.mark.parametrize("scan", [False, True])
def test_stacked_or_not_on_any_mesh(run, tmp_path, scan):
  """Placed as the run has its leaves, in buffers that it can donate."""
  workdir, experiment, state = run
  if scan:  # and from the other form
    experiment = tiny.experiment("ijepa")
    workdir, state = tmp_path, save(experiment, tmp_path)
  own = prepared(
    weights=workdir, method__encoder__scan=scan, mesh__fsdp=2, mesh__tensor=2, mesh__data=2
  )
  start, before, after = begin(own)
  for branch, weights in encoders(experiment, state).items():
    same(encoders(own, after)[branch], weights)
  jax.tree.map(lambda x, y: None if x.sharding == y.sharding else pytest.fail(), before, after)
  assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(after.carry))
  assert "predictor too" in start.text


def test_stacking_is_undone():
  rng = np.random.default_rng(0)
  flat = {f"transformer/block{i}/fc1/kernel": rng.normal(size=(2, 3)) for i in range(12)}
  flat |= {"norm/scale": rng.normal(size=3)}
  assert stacked(flat).keys() == {"transformer/blocks/fc1/kernel", "norm/scale"}
  same(flatten(unflatten(stacked(flat))), flat)


def test_one_branch_for_all(run, tmp_path):
  """Chosen, or the only one there is; and the default where the run has one."""
  workdir, experiment, state = run
  weights = encoders(experiment, state)
  source.write(source.read(workdir), tmp_path / "online", branch="online")
  ijepa = tiny.experiment("ijepa")
  for own, wanted in (
    (asking(ijepa, workdir, branch="online"), "online"),
    (asking(ijepa, tmp_path / "online"), "online"),
    (asking(tiny.experiment("simclr"), workdir), "target"),
    (asking(tiny.experiment("simclr"), workdir, branch="online"), "online"),
  ):
    _, _, after = begin(own)
    for found in encoders(own, after).values():
      same(found, weights[wanted])


def test_a_folder_of_convert_and_its_predictor(run, tmp_path):
  workdir, experiment, state = run
  source.write(source.read(workdir), tmp_path / "out")
  own = asking(tiny.experiment("ijepa"), tmp_path / "out")
  start, _, after = begin(own)
  for branch, weights in encoders(experiment, state).items():
    same(encoders(own, after)[branch], weights)
  same(flatten(after.params["predictor"]), flatten(state.params["predictor"]))
  assert start.text.startswith(f"{tmp_path / 'out'} (jepax, sha256 ")


@pytest.mark.parametrize(
  ("predictor", "why"),
  [
    (dict(width=16, depth=2), "theirs has another depth"),
    (dict(width=16, depth=1, heads=4), "theirs has another heads"),  # of the same shapes
  ],
)
def test_a_predictor_of_another_kind_stays_random(run, predictor, why):
  start, before, after = begin(prepared(weights=run[0], method__predictor=predictor))
  assert f"predictor at random ({why})" in start.text
  assert not any(path.startswith("params/predictor/") for path in changed(before, after))


# --- positions ------------------------------------------------------------------------------


def test_tables_that_hold_what_the_run_computes(run, tmp_path):
  """Meta's files hold the sin-cos table, and the run has none; or the other way round."""
  workdir, experiment, state = run
  source.write(source.read(workdir).tabled(), tmp_path / "tabled")
  ijepa = tiny.experiment("ijepa")
  _, _, after = begin(asking(ijepa, tmp_path / "tabled"))
  same(encoders(ijepa, after)["target"], encoders(experiment, state)["target"])
  learned = dict(tiny.ENCODER, position="learned", grid=(4, 4))
  own = prepared(weights=workdir, method__encoder=learned)
  found = encoders(own, begin(own)[2])["target"]
  np.testing.assert_array_equal(found["position"], source.read(workdir)._sincos((4, 4)))


def test_another_grid(run):
  large = np.kron(tiny.images(32), np.ones((1, 2, 2, 1), np.uint8))
  data = Data.from_arrays(large, size=32, mean=DATA.mean, std=DATA.std)
  with pytest.raises(ValueError, match=r"init.positions\): .* grid of \(4, 4\) .*make \(8, 8\)"):
    read_start(prepared(weights=run[0], data=data), NOWHERE)
  own = prepared(weights=run[0], data=data, init__positions="recompute")
  same(encoders(own, begin(own)[2])["online"], encoders(run[1], run[2])["online"])
  with pytest.raises(ValueError, match=r"positions='recompute' .*position=learned .*grid='\(8,8\)"):
    read_start(asking(own, run[0], positions="interpolate"), NOWHERE)
  learned = dict(tiny.ENCODER, position="learned", grid=(8, 8))
  own = prepared(weights=run[0], data=data, init__positions="interpolate", method__encoder=learned)
  wanted = jepax.pretrained.load(run[0], size=32, positions="interpolate").params["position"]
  np.testing.assert_array_equal(encoders(own, begin(own)[2])["target"]["position"], wanted)


# --- what is refused ------------------------------------------------------------------------


def coloured(**normalisation) -> Data:
  return Data.from_arrays(np.repeat(tiny.images(32), 3, -1), **normalisation)


MISFITS = [
  (
    "ijepa",
    dict(method__encoder=dict(tiny.ENCODER, width=64, depth=2)),
    {},
    r"it has width=32 \(here 64\), depth=1 \(here 2\)\..* --config.method.encoder.width=32 "
    r"--config.method.encoder.depth=1$",
  ),
  ("ijepa", dict(method__encoder__patch=2), {}, r"patch=4 \(here 2\).*method.encoder.patch=4$"),
  ("ijepa", dict(method__encoder__heads=4), {}, r"heads=2 \(here 4\)"),
  (
    "mae",
    {},
    {},
    r"class_token=False \(here True\).* weights; the method decides on a class token$",
  ),
  ("data2vec2", {}, {}, r"norms='pre' \(here 'post'\)"),
  ("ijepa", dict(method__encoder__norm_epsilon=1e-5), {}, r"norm_epsilon=1e-06 \(here 1e-05\)"),
  ("simclr", dict(method__encoder=RESNET), {}, r"a ViT, and the run's encoder is a ResNet: set"),
  ("ijepa", {}, dict(data=coloured()), r"1 channel\(s\), and data.channels=3: set --config.data"),
  (
    "ijepa",
    {},
    dict(data=Data.from_arrays(tiny.images(32), mean=(0.5,), std=(0.5,))),
    r"normalised by mean=\(0\.\d+,\).*data.mean=\(0.5,\).*set mean=.* in Data.from_arrays",
  ),
  ("ijepa", dict(init__branch="targt"), {}, r"init.branch='targt'.*did you mean 'target'"),
]


@pytest.mark.parametrize(("method", "overrides", "given", "message"), MISFITS)
def test_weights_that_do_not_fit(run, method, overrides, given, message):
  with pytest.raises(ValueError, match=message) as error:
    read_start(prepared(method, run[0], **given, **overrides), NOWHERE)
  assert len(str(error.value).splitlines()) == 1


def test_parameters_that_no_setting_tells_of(run, tmp_path):
  weights = source.read(run[0])
  for params in weights.branches.values():
    params["embed/extra"] = np.zeros(3, np.float32)
    del params["norm/bias"]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(source, "read", lambda path, method: weights)
    with pytest.raises(
      ValueError, match=r"embed/extra \[3\], here none; norm/bias none, here \[32"
    ):
      read_start(asking(tiny.experiment("ijepa"), "patched"), NOWHERE)


@pytest.mark.parametrize("there", [False, True])
def test_no_weights_there(tmp_path, there):
  """The sentence of `pretrained.load`, and nothing is written."""
  path = tmp_path / "weights"
  if there:
    path.mkdir()
  with pytest.raises(ValueError, match="holds no weights") as wanted:
    jepax.pretrained.load(path)
  for start in (fit.run, preflight.run):
    with pytest.raises(ValueError, match=re.escape(str(wanted.value))):
      start(tiny.config("ijepa", init__weights=str(path)), tmp_path / "work", data=DATA)
  assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
  ("init", "message"),
  [
    (dict(init__branch="target"), r"init.branch='target' without .* set init.weights"),
    (dict(init__positions="recompute"), r"init.positions='recompute' without"),
    (dict(init__positions="interpolat"), r"did you mean 'interpolate'"),
  ],
)
def test_settings_that_can_not_be(init, message):
  with pytest.raises(ValueError, match=message):
    prepare(tiny.config("ijepa", **init), data=DATA)


def test_a_plan_needs_no_weights():
  config = tiny.config("ijepa", init__weights=str(NOWHERE), data__size=16)
  planned = plan.describe(config, targets.find("cpu:8", slices=1), examples=128)
  assert planned.config.init.weights


# --- a run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight(run) -> Experiment:
  """A run on eight devices, parameters split, that starts from the other one."""
  return prepared(weights=run[0], mesh__fsdp=2, stop__metric="")


@pytest.fixture
def once(monkeypatch, eight):
  """Prepares nothing anew, so that all compiles once."""

  def ready(config, data, method):
    assert method is None
    return dataclasses.replace(eight, config=config)

  for module in (fit, preflight):
    monkeypatch.setattr(module, "prepare", ready)


@pytest.fixture(scope="module")
def finished(run, eight, tmp_path_factory):
  """(workdir, results, the state its first step was given, as numpy)."""
  workdir, seen = tmp_path_factory.mktemp("run") / "work", []

  def step(state, batch):
    if not seen:
      seen.append(jax.device_get(state))
    return eight.train_step(state, batch)

  with pytest.MonkeyPatch.context() as patch:
    ready = dataclasses.replace(eight, train_step=step)
    patch.setattr(fit, "prepare", lambda config, data, method: ready)
    results = fit.run(eight.config, workdir, data=DATA)
  return workdir, results, seen[0]


def test_training_begins_with_the_weights(run, eight, finished):
  _, experiment, state = run
  _, _, first = finished
  for branch, weights in encoders(experiment, state).items():
    same(encoders(eight, first)[branch], weights)
  fresh = jax.device_get(eight.initial_state())
  for name in ("step", "opt_state", "key", "skipped"):
    assert not changed(getattr(fresh, name), getattr(first, name))
  assert eight.train_step.__wrapped__._cache_size() == 1  # what was put in needs no second trace


def test_the_control_is_random_and_the_start_beside_it(run, eight, finished):
  workdir, results, first = finished
  assert list(results["knn"]) == ["target", "online", "start", "random_init", "pixels"]
  assert results["train"]["start"].startswith(f"{run[0]} (run, step 10, sha256 ")
  probe = summary.make_probe(eight, final=True)
  state = jax.device_put(first, jax.tree.map(lambda x: x.sharding, eight.abstract_state))
  for name, of in (("start", state), ("random_init", eight.initial_state())):
    wanted = probe({name: eight.encoders(of)["target"]})[name]
    found = results["collapse"][name] | {s: results[s][name] for s in ("knn", "linear")}
    assert found == wanted
  assert results["collapse"]["start"] != results["collapse"]["random_init"]
  rows = read_history(workdir)
  for name in ("start", "random_init"):
    assert [row["step"] for row in rows if f"knn/{name}" in row] == [0]
  with Checkpoints(workdir / "checkpoints") as saved:
    memory = saved.meta()["memory"]
  assert memory["control"]["rankme"] == results["collapse"]["random_init"]["rankme"]  # same images
  assert "start weights" in (workdir / "report.html").read_text()


@pytest.mark.usefixtures("once")
def test_resumes_without_the_weights(run, eight, finished, tmp_path, capsys):
  workdir, results, _ = finished
  shutil.copytree(workdir, tmp_path / "work")
  shutil.rmtree(tmp_path / "work" / "checkpoints" / "10")
  moved = run[0].rename(run[0].with_name("moved"))
  try:
    preflight.show(preflight.run(eight.config, tmp_path / "work", data=DATA))
    assert "init.weights is not read: the workdir has a checkpoint" in capsys.readouterr().out
    again = fit.run(eight.config, tmp_path / "work", data=DATA)
    other = eight.config.copy_and_resolve_references()
    with other.unlocked():
      other.init.weights = str(moved)
    with pytest.raises(ValueError, match=r"(?s)init.weights: saved .*another --workdir"):
      fit.run(other, tmp_path / "work", data=DATA)
  finally:
    moved.rename(run[0])
  timed = {key: again["train"][key] for key in ("seconds", "images_per_second")}
  assert again == {**results, "train": {**results["train"], **timed}}


@pytest.mark.usefixtures("once")
def test_the_start_is_left_out_where_the_final_probes_changed(eight, finished):
  config = eight.config.copy_and_resolve_references()
  with config.unlocked():
    config.eval.final_bank = 32
  again = fit.run(config, finished[0], data=DATA)
  assert list(again["knn"]) == ["target", "online", "random_init", "pixels"]


@pytest.mark.usefixtures("once")
def test_a_dry_run_reads_the_weights(run, eight, tmp_path, capsys):
  findings = preflight.run(eight.config, tmp_path / "work", data=DATA)
  preflight.show(findings)
  line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("start "))
  assert f"{run[0]} (run, step 10, sha256 " in line and "target encoder from 'target'" in line
  assert findings.moved["target encoder"][0] > 0 and not (tmp_path / "work").exists()
