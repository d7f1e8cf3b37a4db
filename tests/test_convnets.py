"""Convolutional encoders: their shapes and statistics, and a run from training to its report."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jepax import config as config_lib
from jepax import fit, optim, pretrained
from jepax.checkpoint import Checkpoints
from jepax.config import Run, build_method
from jepax.convert import source
from jepax.evals import finetune, maps, show, suite
from jepax.evals.registry import PROTOCOLS
from jepax.experiment import prepare
from jepax.metrics import read_history
from jepax.models import encoder as encoders
from jepax.models.convnext import convnext
from jepax.models.resnet import EPSILON, BatchNorm, ResNet, resnet
from jepax.sharding import global_batch, make_mesh

RESNET = dict(variant="resnet18", stem="cifar", width=16, depths=(1, 1))
CONVNEXT = dict(variant="convnext_tiny", stem=1, width=16, depths=(1, 1))
STEPS, HALF = 4, 2
CONFIGS = Path(__file__).parent.parent / "configs"

init, apply, train = (
  jax.jit(f, static_argnums=0) for f in (encoders.init, encoders.apply, encoders.train)
)


def config(method: str = "simclr", encoder: dict = RESNET):
  return tiny.config(
    method,
    total=f"{STEPS} steps",
    checkpoint__every=f"{HALF} steps",
    eval__every=0,
    method__encoder=encoder,
  )


def normal(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def leaves(tree) -> dict[str, np.ndarray]:
  found = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in found}


# --- models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("module", "parameters", "side", "cells"),
  [
    (resnet("resnet18"), 11_176_512, 64, 4),
    (resnet("resnet50"), 23_508_032, 224, 49),
    (resnet("resnet18", stem="cifar"), 11_168_832, 32, 16),
    (convnext("convnext_tiny"), 27_818_592, 224, 49),
    (convnext("convnext_tiny", stem=2), 27_815_136, 32, 4),
  ],
  ids=lambda value: value.__class__.__name__ if dataclasses.is_dataclass(value) else None,
)
def test_sizes(module, parameters, side, cells):
  """Parameters are torchvision's less its classifier; the small stems are smaller by their own."""
  images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
  weights = jax.eval_shape(lambda x: encoders.init(module, jax.random.key(0), x), images)
  params, statistics = encoders.split(weights)
  assert sum(x.size for x in jax.tree.leaves(params)) == parameters
  norms = [path for path in leaves(params) if path.endswith("['scale']")]
  assert len(leaves(statistics)) == (2 * len(norms) if isinstance(module, ResNet) else 0)
  tokens = jax.eval_shape(lambda w, x: encoders.apply(module, w, x), weights, images)
  assert tokens.shape == (2, cells, module.width) and tokens.dtype == jnp.float32
  assert (side // module.patch) ** 2 == cells and module.prefix == 0


@pytest.mark.parametrize("module", [resnet(**RESNET), convnext(**CONVNEXT)])
def test_half_precision_keeps_parameters_and_statistics_whole(module):
  module = module.clone(dtype=jnp.bfloat16)
  images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  weights = jax.eval_shape(lambda x: encoders.init(module, jax.random.key(0), x), images)
  tokens, moved = jax.eval_shape(lambda w, x: encoders.train(module, w, x), weights, images)
  assert {x.dtype for x in jax.tree.leaves((weights, tokens, moved))} == {jnp.dtype("float32")}


def test_zero_init_starts_every_block_as_its_skip():
  module = resnet("resnet50", width=16, depths=(1, 2), stem="cifar", zero_init=True)
  weights = init(module, jax.random.key(0), jnp.zeros((2, 8, 8, 1)))
  zero = [path for path, x in leaves(weights).items() if path.endswith("['scale']") and not x.any()]
  assert len(zero) == sum(module.depths) and all("['bn3']" in path for path in zero)


def test_batch_norm_is_the_slow_form():
  norm, x = BatchNorm(), 3 * normal(4, 3, 5, 2) + 1
  variables = norm.init(jax.random.key(0), x)
  variables = {**variables, "params": {"scale": jnp.array([2.0, -1.0]), "bias": jnp.ones(2)}}
  mean, var = np.zeros(2), np.ones(2)
  for batch in (x, x[:2] - 1):
    y, moved = norm.apply(variables, batch, mutable=["batch_stats"])
    for c in range(2):
      values = batch[..., c].astype(np.float64).ravel()
      wanted = (batch[..., c] - values.mean()) / np.sqrt(values.var() + EPSILON)
      np.testing.assert_allclose(y[..., c], (2, -1)[c] * wanted + 1, atol=1e-5)
      mean[c] = 0.9 * mean[c] + 0.1 * values.mean()
      var[c] = 0.9 * var[c] + 0.1 * values.var(ddof=1)  # torch's: unbiased
    np.testing.assert_allclose(moved["batch_stats"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(moved["batch_stats"]["var"], var, rtol=1e-5)
    variables |= moved
  frozen = norm.apply(variables, x)
  wanted = (x - mean) / np.sqrt(var + EPSILON) * [2, -1] + 1
  np.testing.assert_allclose(frozen, wanted, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match="one image whose map is one cell"):
    norm.apply(variables, x[:1, :1, :1], mutable=["batch_stats"])


def test_evaluation_does_not_mix_images():
  module, images = resnet(**RESNET), normal(4, 16, 16, 1)
  weights = init(module, jax.random.key(0), images)
  others = np.concatenate([images[:1], 5 * images[1:]])
  np.testing.assert_array_equal(
    apply(module, weights, images)[0], apply(module, weights, others)[0]
  )
  tokens, _ = train(module, weights, images)
  assert np.abs(tokens - apply(module, weights, images)).max() > 0.1  # in training it does


def test_drop_path_of_a_convnext_acts_where_it_is_asked_for():
  module, images = convnext(**CONVNEXT, drop_path=0.9, layer_scale=1.0), normal(8, 16, 16, 1)
  weights = init(module, jax.random.key(0), images)
  plain = apply(module, weights, images)
  np.testing.assert_array_equal(plain, train(module, weights, images)[0])
  dropped = apply(module, weights, images, rngs={"drop_path": jax.random.key(1)})
  changed = (np.abs(dropped - plain).max((1, 2)) > 1e-4).mean()
  assert changed > 0.5  # 0.98 of samples lose or, being kept, amplify one of the branches


# --- methods --------------------------------------------------------------------------------


def method(name: str, encoder: dict, **changes):
  run = Run(size=16, channels=1, mean=(0.5,), std=(0.2,), steps=10)
  return build_method({"name": name, **tiny.METHODS[name], "encoder": encoder, **changes}, run)


def test_both_views_move_the_statistics():
  simclr = method("simclr", RESNET)
  batch = {"image": jnp.asarray(tiny.images(8))}
  params, carry = jax.jit(simclr.init)(jax.random.key(0), batch)
  assert set(carry) == {"statistics"} and set(carry["statistics"]) == {"online"}
  views = normal(2, 8, 16, 16, 1)
  (z, _), moved = jax.jit(simclr.project)(params, carry, list(views))
  assert z.shape == (8, 16)
  mean, kernel = 0.0, params["encoder"]["conv"]["kernel"]
  for view in views:
    stem = jax.lax.conv_general_dilated(
      view, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    mean = 0.9 * mean + 0.1 * stem.mean((0, 1, 2))
  # Means of some thousand values that almost cancel.
  np.testing.assert_allclose(moved["statistics"]["online"]["bn"]["mean"], mean, atol=1e-6)


def test_a_target_has_statistics_of_its_own():
  """The target's views move its own, and its update averages parameters alone."""
  byol = method("byol", RESNET)
  batch = {"image": jnp.asarray(tiny.images(8))}
  params, carry = jax.jit(byol.init)(jax.random.key(0), batch)
  chex.assert_trees_all_equal(carry["statistics"]["target"], carry["statistics"]["online"])
  project = jax.jit(byol.project, static_argnames="branch")
  _, moved = project(params, carry, [normal(8, 16, 16, 1)], branch="target")
  chex.assert_trees_all_equal(moved["statistics"]["online"], carry["statistics"]["online"])
  online, target = (moved["statistics"][branch] for branch in byol.branches)
  assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (online, target)), strict=True))
  after = byol.update(jax.tree.map(lambda p: p + 1, params), moved, 0)
  chex.assert_trees_all_equal(after["statistics"], moved["statistics"])
  for branch in byol.branches:
    weights = byol.weights(params, after, branch=branch)
    chex.assert_trees_all_equal(encoders.split(weights)[1], moved["statistics"][branch])


@pytest.mark.parametrize("name", ["barlow_twins", "lejepa", "moco_v3", "simsiam", "vicreg"])
def test_every_method_with_whole_views_takes_them(name):
  changes = {"frozen_patches": False} if name == "moco_v3" else {}
  for encoder in (RESNET, CONVNEXT):
    built = method(name, encoder, **changes)
    batch = {"image": jnp.asarray(tiny.images(8))}
    params, carry = jax.eval_shape(built.init, jax.random.key(0), batch)
    step = jnp.zeros((), jnp.int32)
    _, out = jax.eval_shape(built.loss, params, carry, batch, jax.random.key(0), step)
    chex.assert_trees_all_equal_shapes_and_dtypes(out.carry, carry)
    assert ("statistics" in carry) == (encoder is RESNET)


@pytest.mark.parametrize(
  ("name", "encoder", "changes", "message"),
  [
    ("ijepa", RESNET, {}, "'resnet18' is convolutional, and this method hides tokens.*simclr"),
    ("mae", dict(variant="convnext_tiny"), {}, "use a ViT, one of .*'tiny'"),
    ("moco_v3", RESNET, {}, "frozen_patches is for a ViT.*set it to False"),
    ("simclr", {**RESNET, "variant": "resnet34"}, {}, "encoder.variant.*'resnet34'.*'resnet50'"),
    ("simclr", dict(variant="resnet18", patch=7), {}, r"\['patch'\], which variant='resnet18'"),
    ("simclr", {**RESNET, "class_token": True}, {}, "encoder.class_token is unknown"),
    ("simclr", {**RESNET, "stem": "small"}, {}, "stem='small' is unknown.*'cifar'"),
    ("simclr", {**RESNET, "width": 15}, {}, "width=15 must be a positive multiple of 2"),
    ("simclr", {**RESNET, "depths": (1, 0)}, {}, "the blocks of each stage"),
    ("simclr", {**CONVNEXT, "drop_path": 0.5}, {}, "drop_path is decided by the run"),
  ],
)
def test_combinations_that_cannot_be(name, encoder, changes, message):
  with pytest.raises(ValueError, match=message):
    method(name, encoder, **changes)


def test_images_that_do_not_divide_into_cells():
  with pytest.raises(ValueError, match=r"16x16 pixels do not.* cells of 32.*multiples of 32"):
    prepare(config(encoder=dict(variant="resnet18")), data=tiny.data())


@pytest.mark.parametrize("encoder", [RESNET, CONVNEXT], ids=["resnet", "convnext"])
def test_decay_moves_kernels_alone(encoder):
  built = method("simclr", encoder)
  batch = {"image": jax.ShapeDtypeStruct((8, 16, 16, 1), jnp.uint8)}
  params, _ = jax.eval_shape(built.init, jax.random.key(0), batch)
  assert jax.tree.map(lambda x: len(x.shape) > 1, params) == optim.decayed(params)


@pytest.mark.parametrize(
  "spec",
  [f"cifar10_resnet18.py:method={m}" for m in ("barlow_twins", "byol", "simclr", "simsiam")]
  + [f"imagenette_resnet18.py:method={m}" for m in ("barlow_twins", "byol", "simsiam", "vicreg")],
)
def test_recipes_of_every_method(spec):
  """What their defaults alone would not show; shapes are the suite's of all configs."""
  loaded = config_lib.load(str(CONFIGS / spec))
  run = Run(size=loaded.data.size, channels=3, mean=loaded.data.mean, std=loaded.data.std, steps=10)
  built = build_method(loaded.method, run)
  assert built.encoder.depths == (2, 2, 2, 2)
  assert loaded.data.size // built.encoder.patch == 4
  optim.build(loaded.optim, steps=10, warmup=0)


def test_layer_decay_is_for_transformers():
  with pytest.raises(ValueError, match="layer_decay and embed_scale are for transformers"):
    optim.layer_scales({"encoder": {"conv": {"kernel": jnp.zeros(3)}}}, decay=0.5)


# --- a run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight():
  """SimCLR with a ResNet on eight devices."""
  return prepare(config(), data=tiny.data())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, eight):
  """(workdir, results) of its run of a few steps."""
  workdir = tmp_path_factory.mktemp("run") / "work"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(fit, "prepare", lambda config, data, method: eight)  # compiled once for all tests
    return workdir, fit.run(config(), workdir, data=tiny.data())


def saved(workdir, abstract, step: int):
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    return checkpoints.restore(abstract, step=step)[0]


def test_results_and_report(finished):
  workdir, results = finished
  assert set(results["knn"]) == {"online", "random_init", "pixels"}
  assert results["train"]["steps"] == STEPS and results["alarms"] == []
  assert (workdir / "report.html").stat().st_size > 10_000


def test_resumes_at_the_same_bits(finished, eight, tmp_path):
  workdir = tmp_path / "work"
  shutil.copytree(finished[0], workdir)
  wanted = saved(workdir, eight.abstract_state, STEPS)
  state = saved(workdir, eight.abstract_state, HALF)
  with eight.loader(start=HALF) as batches:
    for batch in batches:
      placed = global_batch({"image": batch["image"]}, eight.batch_sharding)
      state, _ = eight.train_step(state, placed)
  chex.assert_trees_all_equal(state, wanted)


def test_an_update_that_is_not_finite_keeps_the_statistics(eight):
  state = eight.initial_state()
  state = state.replace(params=jax.tree.map(lambda p: p * jnp.nan, state.params))
  before = jax.device_get(state.carry)
  state, metrics = eight.train_step(state, global_batch(tiny.batches(1)[0], eight.batch_sharding))
  assert metrics["train/skipped"] == 1
  chex.assert_trees_all_equal(jax.device_get(state.carry), before)


def test_eight_devices_equal_one(finished, eight):
  """Loss and statistics, after steps whose batches were normalised as a whole."""
  one = prepare(config(), data=tiny.data(), mesh=make_mesh(devices=jax.devices()[:1]))
  state, losses = one.initial_state(), []
  with one.loader(start=0) as batches:
    for batch in batches:
      placed = global_batch({"image": batch["image"]}, one.batch_sharding)
      state, metrics = one.train_step(state, placed)
      losses.append(float(metrics["train/loss"]))
  wanted = [row["train/loss"] for row in read_history(finished[0]) if "train/loss" in row]
  # Float32 sums in another order, ten times its rounding after four steps of AdamW.
  np.testing.assert_allclose(losses, wanted, rtol=2e-6)
  found, other = (leaves(s.carry) for s in (state, saved(finished[0], eight.abstract_state, STEPS)))
  for path, x in found.items():
    np.testing.assert_allclose(x, other[path], rtol=2e-6, atol=1e-6, err_msg=path)


def test_frozen_encoder(finished, eight):
  workdir, images = finished[0], tiny.images(8, seed=3)
  encoder = pretrained.load(workdir)
  assert (encoder.grid, encoder.pool, encoder.module.width) == ((8, 8), "mean", 16)
  features = encoder(images)
  wanted = eight.encoders(saved(workdir, eight.abstract_state, STEPS))["online"](images)
  chex.assert_trees_all_close(features, wanted, rtol=1e-5, atol=1e-6)  # other devices, same sums
  kinds = encoder.kinds(images, ("pooled", "spatial", "tokens"))
  np.testing.assert_allclose(kinds["pooled"], features.tokens.mean(1), rtol=1e-5, atol=1e-6)
  assert kinds["spatial"].shape == (8, 9 * 16)
  control = encoder.random()
  assert control.sha256() != encoder.sha256() == pretrained.load(workdir).sha256()
  assert jax.tree.structure(control.params) == jax.tree.structure(encoder.params)
  assert not control.params["statistics"]["bn"]["mean"].any()
  larger = pretrained.load(workdir, size=24)  # there are no positions to resize
  assert larger.grid == (12, 12) and larger(images).tokens.shape == (8, 144, 16)


def test_a_jepax_folder_holds_the_statistics(finished, tmp_path):
  weights = source.read(finished[0])
  source.write(weights, tmp_path / "out")
  again = pretrained.load(tmp_path / "out")
  chex.assert_trees_all_equal(again.params, weights.encoder().params)
  assert again.module == weights.module
  with pytest.raises(ValueError, match="holds a ViT here, and this is a ResNet"):
    source.write(weights, tmp_path / "hf", to="hf")
  with pytest.raises(ValueError, match="no positions to interpolate"):
    weights.at(size=24, positions="interpolate")


def test_evaluation_and_what_it_refuses(finished):
  encoder = pretrained.load(finished[0])
  data, images = tiny.data(), tiny.images(4)
  chosen = {name: PROTOCOLS[name] for name in ("knn", "knn_spatial")}
  results = suite.evaluate([encoder, encoder.random()], data, chosen)
  assert set(results["knn_spatial"]["scores"]) == {"online", "random_init", "pixels"}
  assert show.gallery(encoder, data, batch_size=64).attention is None
  for name in ("attentive", "finetune", "linear_last4", "linear_mae"):
    with pytest.raises(ValueError, match=f"{name} .*no encoder here|for {name} an encoder needs"):
      suite.evaluate([encoder], data, {name: PROTOCOLS[name]})
  for refused in (
    lambda: encoder.layers(images, last=1),
    lambda: maps.attention_maps(encoder, images),
    lambda: finetune.classifier(encoder, num_classes=4, protocol=None),
  ):
    with pytest.raises(ValueError, match="needs the blocks of a ViT, and this is a ResNet"):
      refused()
  with pytest.raises(ValueError, match="no 'last4' features; it has"):
    encoder.kinds(images, ("last4",))
