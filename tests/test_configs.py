"""Every config: by its shapes at full size, and for real in `:smoke`."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pretend_gpu
import pytest

from jepax import config as config_lib
from jepax import sharding
from jepax.data.build import Data
from jepax.experiment import Experiment, prepare
from jepax.models.vit import ViT

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
IMAGENET = 1_281_167

# Millions of parameters, encoder and predictor. Source: counts of facebookresearch/ijepa's modules;
# the paper has no tiny and small models and hence no predictors for them.
PARAMETERS = {
  "ijepa_vitti": (5.5, None),
  "ijepa_vits": (21.6, None),
  "ijepa_vitb": (85.6, 11.2),
  "ijepa_vitl": (303.1, 22.1),
  "ijepa_vith14": (630.4, 22.3),
  "ijepa_vith16_448": (630.7, 22.3),
  "ijepa_vitg16": (1011.1, 29.5),
}

# Smoke forms whose method and whose encoder other ones run are traced alone: compiling takes long.
ALIKE = {
  "ijepa_vitb": tuple(
    f"ijepa_{size}" for size in ("vitti", "vits", "vitl", "vith14", "vith16_448", "vitg16")
  ),
  "cjepa_fashion_mnist": ("ijepa_fashion_mnist",),
  "data2vec2_vitb": ("data2vec2_fashion_mnist",),
  "dinov2_vitl": ("dinov2_fashion_mnist",),
  "lejepa_imagenet": ("lejepa_fashion_mnist",),
  "moco_v3_imagenet": ("moco_v3_fashion_mnist",),
  "barlow_twins_imagenet": (
    *(f"{name}_imagenet" for name in ("byol", "simclr", "simsiam", "vicreg")),
    "barlow_twins_fashion_mnist",
  ),
  "cifar10_resnet18": ("imagenette_resnet18",),
  "imagenette_resnet18": ("cifar10_resnet18",),
}
RUN = [name for name in CONFIGS if name not in sum(ALIKE.values(), ())]


def spec(name: str) -> str:
  return str(FOLDER / f"{name}.py")


@functools.cache
def full_size(name: str) -> Experiment:
  """The config, prepared for as many images as ImageNet has.

  They have one pixel each: nothing reads them, and the model sees data.size all the same.
  """
  config = config_lib.load(spec(name))
  return prepare(config, data=Data.unread(config.data, count=IMAGENET))


@functools.cache
def smoke(name: str) -> Experiment:
  """The smoke form of a config on one device, as on a laptop; traces the training step."""
  one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "make_mesh", one)
    return prepare(config_lib.load(spec(name) + ":smoke"))


def images(config, *, count: int, sharding=None) -> jax.ShapeDtypeStruct:
  c = config.data
  return jax.ShapeDtypeStruct((count, c.size, c.size, c.channels), np.uint8, sharding=sharding)


def patches(experiment: Experiment) -> int:
  """Along a side."""
  return experiment.config.data.size // experiment.method.encoder.patch


def millions(params) -> float:
  return round(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6, 1)


def test_the_recipes_are_found():
  assert set(PARAMETERS) | {"quickstart"} < set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_docstring_says_how_to_run(name):
  doc = ast.get_docstring(ast.parse(Path(spec(name)).read_text()))
  assert f"python -m jepax.main --config=configs/{name}.py" in doc


@pytest.mark.parametrize("name", CONFIGS)
def test_train_step_at_full_size(name):
  """Those in half precision for a GPU, where cuDNN takes all of their attention."""
  experiment = full_size(name)
  c, state, step = experiment.config, experiment.abstract_state, experiment.train_step.__wrapped__
  half = c.precision == "bfloat16"
  if half:
    # Without the placements, which are of this machine's devices.
    state = jax.tree.map(lambda x: x.update(sharding=None), state)
    with pretend_gpu.one() as written_out:
      traced = jax.make_jaxpr(step.__wrapped__, return_shape=True)
      program, (new, metrics) = traced(state, {"image": images(c, count=c.batch_size)})
  else:
    batch = {"image": images(c, count=c.batch_size, sharding=experiment.batch_sharding)}
    with jax.set_mesh(experiment.mesh):
      new, metrics = jax.eval_shape(step, state, batch)
  chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
  assert {(m.shape, m.dtype.name) for m in metrics.values()} == {((), "float32")}
  for leaf in jax.tree.leaves((state.params, state.carry)):
    assert leaf.dtype == np.float32  # whatever the precision of the matrix products
  if half:
    forward, backward = pretend_gpu.cudnn_calls(program)
    assert written_out == []
    assert forward >= backward >= isinstance(experiment.method.encoder, ViT)


@pytest.mark.parametrize("name", CONFIGS)
def test_features_at_full_size(name):
  experiment = full_size(name)
  c, method, state = experiment.config, experiment.method, experiment.abstract_state
  count, width = c.eval.batch_size, method.encoder.width
  batch = {"image": images(c, count=count)}
  for branch in method.branches:
    encode = functools.partial(method.encode, branch=branch)
    features = jax.eval_shape(encode, state.params, state.carry, batch)
    assert features.tokens.shape == (count, patches(experiment) ** 2, width)
    assert features.pooled.shape == (count, width)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameters_are_those_of_the_reference(name):
  encoder, predictor = PARAMETERS[name]
  params = full_size(name).abstract_state.params
  assert millions(params["encoder"]) == encoder
  if predictor is not None:
    assert millions(params["predictor"]) == predictor


def test_recipe_of_the_released_vith14():
  """The numbers of facebookresearch/ijepa's in1k_vith14_ep300.yaml, in steps."""
  experiment = full_size("ijepa_vith14")
  rate, decay = (experiment.schedules[f"schedule/{n}"] for n in ("learning_rate", "weight_decay"))
  warmup, steps = 40 * 625, 300 * 625
  assert experiment.steps == steps
  # Update k uses step k + 1 of the schedule. The tolerance is float32's, of sums with 1e-3.
  near = functools.partial(pytest.approx, abs=1e-9)
  assert float(rate(0)) == near(2e-4 + 8e-4 / warmup)
  assert float(rate(warmup - 1)) == near(1e-3)
  assert float(rate(steps - 1)) == near(1e-6)
  assert float(decay(0)) == pytest.approx(0.04, rel=1e-4)
  assert float(decay(steps - 1)) == pytest.approx(0.4)
  assert float(experiment.method.momentum(0)) == pytest.approx(0.996)
  assert float(experiment.method.momentum(steps)) == 1.0


@pytest.mark.parametrize("name", CONFIGS)
def test_smoke_is_of_the_same_method_on_the_same_grid(name):
  small, full = smoke(name), full_size(name)
  assert patches(small) == patches(full)  # and so all that the masks do stays real
  assert small.config.method.name == full.config.method.name


@pytest.mark.parametrize("name", RUN)
def test_smoke_trains_two_steps(name):
  experiment = smoke(name)
  state = experiment.initial_state()
  first = jax.device_get(state.params)
  with experiment.loader(start=0) as batches:
    for _, batch in zip(range(2), batches, strict=False):
      placed = sharding.global_batch({"image": batch["image"]}, experiment.batch_sharding)
      state, metrics = experiment.train_step(state, placed)
  assert int(state.step) == 2 and np.isfinite(metrics["train/loss"])
  assert any(
    np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (first, state.params)), strict=True)
  )
  encode = experiment.encoders(state)[experiment.method.branches[0]]
  assert np.isfinite(encode(batch["image"]).pooled).all()


def test_the_table_of_methods_is_that_of_the_methods(monkeypatch):
  docs = FOLDER.parent / "docs"
  monkeypatch.syspath_prepend(str(docs))
  import methods_table

  page = (docs / "which-method.md").read_text()
  assert methods_table.START + methods_table.table(full_size) + methods_table.END in page
  assert {full_size(r).config.method.name for r in methods_table.RECIPES.values()} == set(
    config_lib.methods()
  )


def test_a_config_imports_the_files_beside_it(tmp_path):
  """Also where another folder has a helper of the same name."""
  before = list(sys.path)
  for folder, seed in (("a", 1), ("b", 2)):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "_shared.py").write_text(f"SEED = {seed}\n")
    path = tmp_path / folder / "recipe.py"
    path.write_text(
      "from _shared import SEED\nfrom jepax.config import base\n\n\n"
      "def get_config(arg=''):\n  c = base()\n  c.seed = SEED\n  return c\n"
    )
    assert config_lib.load(str(path)).seed == seed
  assert sys.path == before
  assert "_shared" not in sys.modules
