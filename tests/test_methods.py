"""The suite that every method passes; a new method needs a row in tiny.METHODS and no test."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from ml_collections import ConfigDict

from jepax import config as config_lib
from jepax import core, sharding
from jepax.core import make_train_step
from jepax.experiment import prepare
from jepax.masks.tokens import Masks, TokenSet
from jepax.methods.mae import MAE
from jepax.methods.two_views import TwoViews

METHODS = sorted(tiny.METHODS)


def train(experiment, steps: int, *, nudge: float = 0.0) -> tuple[Any, list[float]]:
  """Runs the jitted step from the initial state; returns the last state and the losses.

  nudge: relative change of all initial parameters.
  """
  state, losses = experiment.initial_state(), []
  if nudge:
    nudged = jax.jit(lambda params: jax.tree.map(lambda p: p * (1 + nudge), params))
    state = state.replace(params=nudged(state.params))
  for batch in tiny.batches(steps):
    placed = sharding.global_batch(batch, experiment.batch_sharding)
    state, metrics = experiment.train_step(state, placed)
    losses.append(float(metrics["train/loss"]))
  return state, losses


@pytest.fixture(scope="module", params=METHODS)
def name(request) -> str:
  return request.param


@pytest.fixture(scope="module")
def one_device(name):
  """(experiment, state after 10 steps, losses) on one device."""
  experiment = tiny.experiment(name)
  return experiment, *train(experiment, 10)


def start(name, tx):
  """(method, state of step 0 for an optimizer, batch), on no mesh."""
  experiment = tiny.experiment(name)
  state = jax.device_get(experiment.initial_state())
  state = state.replace(opt_state=jax.jit(tx.init)(state.params))
  return experiment.method, state, tiny.batches(1)[0]


@pytest.fixture(scope="module")
def loss(name):
  """Of the method at step 0: seed -> ((value, LossOut), gradients by params and carry)."""
  method, state, batch = start(name, optax.identity())
  graded = jax.jit(jax.value_and_grad(method.loss, argnums=(0, 1), has_aux=True))

  return lambda seed=1: graded(state.params, state.carry, batch, jax.random.key(seed), 0)


def test_every_method_is_in_the_suite():
  assert config_lib.methods() == METHODS


def test_loss_falls_on_one_batch(name):
  tx = optax.adam(3e-3)
  method, state, batch = start(name, tx)
  step = jax.jit(make_train_step(method, tx))
  losses = []
  for _ in range(40):
    state, metrics = step(state, batch)
    losses.append(float(metrics["train/loss"]))
  # Masks and views differ from step to step, hence means of several.
  assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


@pytest.fixture(scope="module")
def rounding(one_device) -> float:
  """What float32 rounding does to ten steps of AdamW, measured.

  By how much the losses move on one device when all parameters change by half a unit in the last
  place, times a few, because sums in another order round at every step and not at the first alone.
  Relative to the largest loss: SimSiam's cosine passes through zero.
  """
  one, _, losses = one_device
  _, nudged = train(one, 10, nudge=6e-8)
  rounding = np.abs(np.subtract(nudged, losses)).max() / np.abs(losses).max()
  assert rounding < 1e-4  # the yardstick itself is small
  return max(1e-6, 10 * rounding)


def compare_with_one(name, losses, rounding, *, fsdp, tensor) -> None:
  experiment = tiny.experiment(name, fsdp=fsdp, tensor=tensor, devices=8)
  state, sharded = train(experiment, 10)
  if fsdp > 1:
    leaves = jax.tree.leaves(state.params)
    assert any(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in leaves)
  np.testing.assert_allclose(sharded, losses, rtol=0, atol=rounding * np.abs(losses).max())


def test_eight_devices_equal_one(name, one_device, rounding):
  """Rows and parameters split over all of them."""
  compare_with_one(name, one_device[2], rounding, fsdp=8, tensor=1)


@pytest.mark.parametrize("name", ["ijepa", "mae", "vicreg"], indirect=True)
@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (2, 2)], ids=["data parallel", "tensor"])
def test_eight_devices_equal_one_on_other_meshes(name, one_device, rounding, fsdp, tensor):
  compare_with_one(name, one_device[2], rounding, fsdp=fsdp, tensor=tensor)


def test_no_gradient_into_the_carry(loss):
  """The target encoder and all else that is carried get exactly none."""
  _, (online, carried) = loss()
  for leaf in jax.tree.leaves(carried):
    assert not np.any(leaf)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(online["encoder"]["transformer"]))


def padded(sampler):
  """The same masks in more slots, the added ones invalid and pointing at arbitrary tokens."""

  def pad(tokens: TokenSet, by: int) -> TokenSet:
    width = [(0, 0)] * (tokens.index.ndim - 1) + [(0, by)]
    index = jnp.pad(tokens.index, width, constant_values=7)
    return TokenSet(index, jnp.pad(tokens.valid, width))

  def draw(keys, step_key) -> Masks:
    masks = sampler(keys, step_key)
    return masks.replace(context=pad(masks.context, 3), targets=pad(masks.targets, 5))

  return draw


def test_padding_never_changes_the_loss(name, loss):
  method, state, batch = start(name, optax.identity())
  if not hasattr(method, "masks"):
    assert isinstance(method, TwoViews)  # no token sets, nothing to pad
    return
  wider = jax.jit(dataclasses.replace(method, masks=padded(method.masks)).loss)
  for seed in (1, 2):  # float32 sums over other lengths
    found, _ = wider(state.params, state.carry, batch, jax.random.key(seed), 0)
    np.testing.assert_allclose(found, loss(seed)[0][0], rtol=1e-6)


def test_accumulation_is_exact_or_refused(name):
  tx = optax.sgd(0.1)
  method, state, batch = start(name, tx)
  if method.couples_batch:
    with pytest.raises(ValueError, match="accumulate=1"):
      make_train_step(method, tx, accumulate=2)
    return
  whole, metrics = jax.jit(make_train_step(method, tx))(state, batch)
  split, split_metrics = jax.jit(make_train_step(method, tx, accumulate=4))(state, batch)
  np.testing.assert_allclose(split_metrics["train/loss"], metrics["train/loss"], rtol=1e-5)
  # Gradients are means of the same 16 samples, summed in another order.
  chex.assert_trees_all_close(split.params, whole.params, rtol=1e-4, atol=1e-6)


def test_labels_are_never_read(name):
  """The program for a batch that has them is the one for a batch that has none."""
  method, state, batch = start(name, optax.identity())

  def program(batch) -> str:
    lowered = jax.jit(method.loss).lower(state.params, state.carry, batch, jax.random.key(1), 0)
    return lowered.as_text()

  assert program({**batch, "label": np.zeros(tiny.BATCH)}) == program(batch)


# What the training step itself promises is tried with a method that carries a target and with one
# that couples the batch.
@pytest.mark.parametrize(
  ("name", "chosen_as_on"),
  [("ijepa", "cpu"), ("vicreg", "cpu"), ("ijepa", "tpu")],
  indirect=["name"],
)
def test_a_step_that_is_not_finite_changes_nothing_but_counters(name, chosen_as_on, monkeypatch):
  """And is no other program than those before and after it."""
  monkeypatch.setattr(core, "platform", lambda: chosen_as_on)
  tx, traces = optax.adam(1e-3), 0
  method, state, batch = start(name, tx)

  class Poisoned:
    couples_batch = method.couples_batch
    init, update, encode = method.init, method.update, method.encode

    def loss(self, params, carry, batch, key, step):
      nonlocal traces
      traces += 1
      loss, out = method.loss(params, carry, batch, key, step)
      return loss * jnp.where(step == 1, jnp.nan, 1.0), out

  step = jax.jit(make_train_step(Poisoned(), tx))
  first, metrics = step(state, batch)
  check_norms(metrics, state.params, first.params)
  second, metrics = step(first, batch)
  for part in ("params", "carry", "opt_state"):
    chex.assert_trees_all_equal(getattr(second, part), getattr(first, part))
  assert second.skipped.tolist() == [1, 1] and int(second.step) == 2
  assert metrics["train/skipped_in_a_row"] == 1
  assert metrics["train/update_norm"] == 0 and metrics["train/param_norm"] > 0
  third, _ = step(second, batch)
  assert third.skipped.tolist() == [0, 1]
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), third.params, second.params)
  assert any(jax.tree.leaves(moved))
  assert traces == 1


def check_norms(metrics, old, new):
  """Those of each part of the parameters and of all, after a step from old to new."""
  squares = {"param": 0.0, "update": 0.0, "grad": 0.0}
  for part in new:
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(p[part])]) for p in (old, new))
    assert float(metrics[f"{part}/param_norm"]) == pytest.approx(np.linalg.norm(b), rel=1e-5)
    moved = np.linalg.norm(np.float64(b) - a)
    assert float(metrics[f"{part}/update_norm"]) == pytest.approx(moved, rel=1e-3)
    for of in squares:
      squares[of] += float(metrics[f"{part}/{of}_norm"]) ** 2
  for of, square in squares.items():
    assert float(metrics[f"train/{of}_norm"]) == pytest.approx(square**0.5, rel=1e-5)


def held_out(experiment, state, images) -> float:
  return experiment.held_out_loss(state, images)["eval/loss"]


def test_held_out_loss_is_that_of_full_batches_and_changes_nothing(name, loss):
  experiment = tiny.experiment(name)
  state = experiment.initial_state()
  before = jax.device_get(state)
  images = np.concatenate([tiny.batches(1)[0]["image"], tiny.images(24, seed=1)])
  one, two, more = (held_out(experiment, state, images[:count]) for count in (16, 32, 40))
  np.testing.assert_allclose(one, loss(seed=0)[0][0], rtol=1e-5)  # sums in another order
  assert two != one
  assert (more == two) == bool(experiment.method.couples_batch)  # then 8 are left out
  assert more == held_out(experiment, state, images)
  chex.assert_trees_all_equal(jax.device_get(state), before)


@pytest.mark.parametrize("name", ["data2vec2", "ijepa", "mae"], indirect=True)
def test_held_out_loss_is_the_same_in_batches_of_any_size(name, one_device):
  experiment, state, _ = one_device
  found = []
  for size in (7, 32):
    config = tiny.config(name, batch_size=size)
    other = prepare(config, data=tiny.data(), mesh=experiment.mesh)
    found.append(held_out(other, state, tiny.images(64, seed=1)))
  np.testing.assert_allclose(found[0], found[1], rtol=1e-6)  # float32 sums of other shapes


def test_few_images_are_a_batch_that_divides():
  one, eight = (tiny.experiment("vicreg", devices=count) for count in (1, 8))
  sizes = [one._coupled_batch(count) for count in (100, 16, 15, 3, 2)]
  assert sizes == [16, 16, 8, 2, 2]
  assert [eight._coupled_batch(count) for count in (16, 15, 7)] == [16, 8, 7]


def test_held_out_loss_of_a_method_that_hides_those_of_its_samples_is_of_full_batches():
  class Hiding(MAE):
    def loss(self, *arguments):
      loss, out = super().loss(*arguments)
      return loss, out.replace(each=None)

  told, config = tiny.experiment("mae"), tiny.config("mae")
  fields = {f.name: getattr(told.method, f.name) for f in dataclasses.fields(MAE)}
  config.method = ConfigDict()
  hidden = prepare(config, data=tiny.data(), mesh=told.mesh, method=Hiding(**fields))
  assert told.per_sample and not hidden.per_sample
  state, images = told.initial_state(), tiny.images(2 * tiny.BATCH + 3)
  whole = held_out(told, state, images[: 2 * tiny.BATCH])
  assert held_out(hidden, state, images) == pytest.approx(whole, rel=1e-6)


def test_encode_is_deterministic_and_shaped(name, one_device):
  experiment, state, _ = one_device
  x = tiny.batches(1)[0]["image"]
  for encode in experiment.encoders(state).values():
    features = encode(x)
    chex.assert_shape(features.tokens, (tiny.BATCH, 16, 32))
    chex.assert_shape(features.pooled, (tiny.BATCH, 32))
    np.testing.assert_array_equal(encode(x).pooled, features.pooled)
    # A sample's features don't depend on its neighbours in the batch.
    turned = encode(x[::-1].copy()).pooled[::-1]
    np.testing.assert_allclose(turned, features.pooled, rtol=1e-5, atol=1e-6)


def test_metrics_are_float32_scalars(loss):
  (_, out), _ = loss()
  for key, value in out.metrics.items():
    assert "/" in key
    chex.assert_shape(value, ())
