"""A method of the caller's own in the trainer, and what tells one such method from another."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from ml_collections import ConfigDict

from jepax import config as config_lib
from jepax import evaluate, fit, preflight, pretrained, sharding
from jepax.checkpoint import Checkpoints
from jepax.core import Features, LossOut
from jepax.data.augment import normalise
from jepax.experiment import prepare
from jepax.given import describe
from jepax.methods.jepa import JEPA
from jepax.optim import linear
from jepax.start import read_start


class Rows(nn.Module):
  """Each row of pixels but one is a token, so their number is no square: [b h w 1] -> [b 15 d]."""

  width: int = 8
  patch, prefix, class_token, position, grid = 4, 0, False, "none", None  # for pretrained.load

  @nn.compact
  def __call__(self, images):
    return nn.Dense(self.width)(images[:, 1:, :, 0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoder:
  """A method that shares nothing with those of the library."""

  encoder: nn.Module = dataclasses.field(default_factory=Rows)
  branches: tuple[str, ...] = ("encoder",)
  pool: str = "mean"
  couples_batch: str = ""
  mean: tuple[float, ...] = (0.5,)
  std: tuple[float, ...] = (0.5,)

  def images(self, batch):
    return normalise(batch["image"], mean=self.mean, std=self.std)

  def tokens(self, params, batch):
    return self.encoder.apply({"params": params["encoder"]}, self.images(batch))

  def init(self, key, batch):
    encoder = self.encoder.init(key, self.images(batch))["params"]
    decoder = 0.1 * jax.random.normal(key, (self.encoder.width, tiny.SIZE))
    return {"encoder": encoder, "decoder": decoder}, {}

  def loss(self, params, carry, batch, key, step):
    x = self.tokens(params, batch) @ params["decoder"]
    return jnp.square(x - self.images(batch)[:, 1:, :, 0]).mean(), LossOut(carry, {})

  def update(self, params, carry, step):
    return carry

  def weights(self, params, carry, *, branch):
    return params["encoder"]

  def encode(self, params, carry, batch, *, branch):
    x = self.tokens(params, batch)
    return Features(x, x.mean(1))


def autoencoder(run: config_lib.Run, **fields) -> Autoencoder:
  return Autoencoder(mean=run.mean, std=run.std, **fields)


def config():
  """That of another method, emptied as the error about two of them says; it is locked."""
  found = tiny.config("mae")
  found.method = ConfigDict()
  return found


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """As on a laptop."""
  one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "make_mesh", one)
    yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(workdir, results) of a run of ten steps."""
  workdir = tmp_path_factory.mktemp("run") / "work"
  return workdir, fit.run(config(), workdir, data=tiny.data(), method=autoencoder)


def test_it_is_trained_probed_and_reported(finished):
  workdir, results = finished
  assert results["train"]["status"] == "finished" and results["train"]["steps"] == 10
  assert results["knn"].keys() == {"encoder", "random_init", "pixels"}
  page = (workdir / "report.html").read_text()
  assert "<title>Autoencoder on" in page and "given_method" in page and ", method=...)" in page


def test_another_method_is_refused(finished):
  workdir, _ = finished
  run = functools.partial(fit.run, workdir=workdir, data=tiny.data())
  with pytest.raises(ValueError, match=r"given_method.encoder.width: saved absent, now 16"):
    run(config(), method=functools.partial(autoencoder, encoder=Rows(16)))
  with pytest.raises(ValueError, match=r"given_method.type: saved '.*', now absent"):
    run(tiny.config("ijepa"))
  with pytest.raises(ValueError, match=r"given_method.type: saved '.*Autoencoder', now '.*Other'"):
    run(config(), method=lambda run: Other())


def test_the_same_method_goes_on(finished):
  """Given by a function of the run or as an object."""
  workdir, results = finished
  data = tiny.data()
  same = Autoencoder(mean=data.mean, std=data.std)
  again = fit.run(config(), workdir, data=data, method=same)
  assert again["knn"] == results["knn"] and again["train"] == results["train"]


def test_another_run_of_it_starts_from_its_weights(finished):
  other = config()
  other.init.weights = str(finished[0])
  run = prepare(other, data=tiny.data(), method=autoencoder)
  state = read_start(run, finished[0].parent / "new").into(run.initial_state())
  with Checkpoints(finished[0] / "checkpoints") as saved:
    trained, _ = saved.restore(run.abstract_state)
  encoder, wanted = state.params["encoder"], trained.params["encoder"]
  chex.assert_trees_all_equal(jax.device_get(encoder), jax.device_get(wanted))
  with pytest.raises(ValueError, match=r"Autoencoder, which its config can't bring back"):
    config_of_ours = tiny.config("mae", init__weights=str(finished[0]))
    read_start(prepare(config_of_ours, data=tiny.data()), finished[0].parent / "new")


def test_a_dry_run(tmp_path, capsys):
  found = preflight.run(config(), tmp_path / "new", data=tiny.data(), method=Autoencoder())
  preflight.show(found)
  assert "Autoencoder, 264 parameters" in capsys.readouterr().out
  assert not (tmp_path / "new").exists()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other(Autoencoder):
  pass


def test_its_weights_need_the_method_again(finished, monkeypatch):
  workdir, _ = finished
  with pytest.raises(ValueError, match=r"trained .*Autoencoder, .*load\(workdir, method=...\)"):
    pretrained.load(workdir)
  with pytest.raises(ValueError, match=r"not the one .* type: saved 'Autoencoder', now 'Other'"):
    pretrained.load(workdir, method=Other())
  with pytest.raises(ValueError, match=r"encoder.width: saved absent, now 16"):
    pretrained.load(workdir, method=Autoencoder(encoder=Rows(16)))
  encoder = pretrained.load(workdir, method=autoencoder)
  run = prepare(config(), data=tiny.data(), method=autoencoder)
  with Checkpoints(workdir / "checkpoints") as saved:
    state, _ = saved.restore(run.abstract_state)
  images = tiny.images(4)
  np.testing.assert_allclose(
    encoder(images).pooled, run.encoders(state)["encoder"](images).pooled, rtol=1e-6, atol=1e-6
  )
  monkeypatch.delattr(Rows, "patch")
  with pytest.raises(ValueError, match=r"the encoder Rows lacks \['patch'\], .*class attributes"):
    pretrained.load(workdir, method=autoencoder)


def test_evaluate_says_that_the_method_is_missing(finished):
  saved = json.loads((finished[0] / "config.json").read_text())
  with pytest.raises(ValueError, match=r"Autoencoder, .*load\(workdir, method=...\), and .*suite"):
    evaluate._check_run(saved, own_data=True)


def test_weights_that_name_their_method_take_no_other(tmp_path):
  with pytest.raises(ValueError, match=r"method= is for the workdir of a run, and .* is none"):
    pretrained.load(tmp_path, method=Autoencoder())


class Thawed(Autoencoder):
  __hash__ = None  # as a dataclass that is not frozen


def lacking(*names):
  """An Autoencoder without some of its parts."""
  parts = {n: getattr(Autoencoder(), n) for n in dir(Autoencoder()) if n[0] != "_"}
  return type("Half", (), {n: part for n, part in parts.items() if n not in names})()


class Shown(Autoencoder):
  def draw_masks(self, key, batch):
    return batch


class Bare(Autoencoder):
  def encode(self, params, carry, batch, *, branch):
    return super().encode(params, carry, batch, branch=branch).pooled


class Dropped(Autoencoder):
  def loss(self, params, carry, batch, key, step):
    return super().loss(params, carry, batch, key, step)[0]


class Telling(Autoencoder):
  metrics: dict | None = None
  each: jax.Array | None = None

  def loss(self, params, carry, batch, key, step):
    loss, out = super().loss(params, carry, batch, key, step)
    return loss, out.replace(metrics=self.metrics, each=self.each)


class Vector(Telling):
  metrics = {"loss/vector": np.zeros(3)}  # noqa: RUF012


class Half(Telling):
  metrics = {}  # noqa: RUF012
  each = np.zeros(2, np.float32)


class Rebuilt(Autoencoder):
  def reconstruct(self, params, carry, batch, key):
    return batch["image"]


class Grown(Autoencoder):
  def update(self, params, carry, step):
    return {"target": params["decoder"]}


class Listed(Autoencoder):
  def weights(self, params, carry, *, branch):
    return [params]


@pytest.mark.parametrize(
  ("method", "message"),
  [
    (lacking("encode", "pool"), r"method=Half lacks \['pool', 'encode'\] of .*jepax.core.Method"),
    (lambda run: None, "method=NoneType lacks"),
    (Autoencoder, "method=Autoencoder is a class; give an object of it"),
    (Autoencoder(branches=()), r"Autoencoder.branches=\(\) must name one or more"),
    (Autoencoder(branches=("a", "a")), "each once"),
    (Autoencoder(branches="target"), "branches='target' must name"),
    (Autoencoder(pool="max"), "Autoencoder.pool='max' is unknown; .*'mean'"),
    (Autoencoder(couples_batch="negative"), "did you mean 'negatives'"),
    (Thawed(), "method=Thawed can't be hashed .*frozen=True"),
    (Shown(), "Shown.draw_masks must return jepax.masks.Masks"),
    (Dropped(), r"Dropped.loss must return a scalar and .*LossOut.*found float32\[\]"),
    (Rows(), "method=Rows is a flax module, not a method: give it as the encoder"),
    (Telling(), "Telling.loss must give LossOut.metrics as a dict of scalars.* found None"),
    (Vector(), r"Vector.loss must give .*scalars by name.*found {'loss/vector': 'float32\[3\]'}"),
    (Half(), r"Half.loss gives float32\[2\] as LossOut.each, the loss of each of 16 samples"),
    (Rebuilt(), "Rebuilt.reconstruct must return a jepax.core.Reconstruction"),
    (Grown(), r"Grown.update must return a carry like that of init, {}, found .*float32\[8, 16\]"),
    (Bare(), r"Bare.encode\(branch='encoder'\) must return jepax.core.Features .*\[16, 8\]"),
    (Listed(), r"Listed.weights\(branch='encoder'\) must return a dict of arrays, found list"),
  ],
)
def test_what_can_not_work_writes_nothing(tmp_path, method, message):
  with pytest.raises(ValueError, match=message):
    fit.run(config(), tmp_path / "run", data=tiny.data(), method=method)
  assert not (tmp_path / "run").exists()


def test_two_methods_are_one_too_many():
  with pytest.raises(ValueError, match=r"'name': 'mae'.*: leave out method= .*ConfigDict\(\)"):
    prepare(tiny.config("mae"), data=tiny.data(), method=Autoencoder())


# --- description ----------------------------------------------------------------------------

RUN = config_lib.Run(size=tiny.SIZE, channels=1, mean=(0.3,), std=(0.3,), steps=10)


def build() -> JEPA:
  return config_lib.build_method(dict(name="ijepa", **tiny.METHODS["ijepa"]), RUN)


def test_a_description_names_what_is_not_at_its_default():
  found = describe(build())
  assert found["type"] == "jepax.methods.jepa.JEPA"
  assert found["encoder"]["width"] == 32 and found["predictor"]["width"] == 16
  assert found["masks"]["target_scale"] == [0.1, 0.25]
  assert "objective" not in found and "min_keep" in found["masks"]
  assert found["momentum"]["variables"] == {"start": 0.9, "end": 1.0, "steps": 10}
  chex.assert_trees_all_equal(found, json.loads(json.dumps(found)))


def other_fields():
  method, same = build(), dataclasses.replace
  return {
    "a number": same(method, grid=(2, 8)),
    "a name": same(method, objective="mse"),
    "a module's": same(method, encoder=method.encoder.clone(depth=2)),
    "a sampler's": same(method, masks=same(method.masks, targets=3)),
    "a schedule's": same(method, momentum=linear(0.8, 1.0, steps=10)),
    "a lambda's constant": same(method, momentum=lambda step: 0.99),
    "another constant": same(method, momentum=lambda step: 0.999),
    "another function": same(method, momentum=lambda step: jnp.cos(0.999)),
  }


def test_every_field_tells_methods_apart():
  found = [describe(method) for method in (build(), *other_fields().values())]
  assert len({json.dumps(one) for one in found}) == len(found)


def test_arrays_circles_and_partials():
  x = np.arange(3.0)
  assert describe(x) != describe(x + 1) and describe(x).startswith("float64[3] ")
  assert describe(jnp.arange(3.0)) == describe(np.float32(x)) and describe(x[1]) == 1.0
  circle: list = []
  circle.append(circle)
  assert describe(circle) == ["itself"]
  assert describe(functools.partial(linear, 0.5, end=1.0)) == {
    "partial": "jepax.optim.linear",
    "args": [0.5],
    "end": 1.0,
  }
  assert describe(jax.jit(linear)) == describe(linear) == "jepax.optim.linear"


PROGRAM = """
import json
import test_given
from jepax.given import describe
shade = {"a", "b", "c", "d"}
print(json.dumps([describe(test_given.build()), describe(lambda x: x in {"p", "q", "r", "s"}),
                  describe(shade), describe(test_given.Autoencoder())]))
"""


def test_a_description_is_the_same_in_every_process():
  """With another order of sets and other addresses."""

  def printed(seed: str) -> str:
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
    return subprocess.run(
      [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    ).stdout

  first = printed("1")
  assert first == printed("2") and " at 0x" not in first
