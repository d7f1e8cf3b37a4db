"""Linear probes by SGD and LARS: against a slow form, one by one, and their choice of a member."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from jepax.evals import grid, lars
from jepax.evals.grid import Grid

SMALL = Grid(learning_rates=(0.5, 0.05), weight_decays=(0.0, 0.1), epochs=2, batch_size=16)


@pytest.fixture(scope="module")
def blobs():
  rng = np.random.default_rng(0)
  y = rng.integers(0, 3, size=50)
  x = rng.normal(size=(3, 6))[y] + 0.5 * rng.normal(size=(50, 6)) + 2
  return x.astype(np.float32), y


@pytest.mark.parametrize(("norm", "trust"), [("none", None), ("running", 0.1)])
def test_the_grid_gives_the_weights_of_its_members_trained_one_by_one(blobs, norm, trust):
  whole = dataclasses.replace(SMALL, learning_rates=(5.0, 0.5), norm=norm, trust=trust)
  together = grid.train(*blobs, num_classes=3, grid=whole, seed=0)
  for i, (rate, decay) in enumerate(whole.members):
    single = dataclasses.replace(whole, learning_rates=(rate,), weight_decays=(decay,))
    alone = grid.train(*blobs, num_classes=3, grid=single, seed=0)
    found = together.member(i)
    # 1e-5: sums over 6 features and 16 rows are added in another order, 6 steps long.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), alone, found)
  assert np.asarray(together.weight).std(1).max() > 1e-3, "members must differ"


def slow_train(views, y, start, *, rate, decay, grid, num_classes):
  """One member on full batches, step by step, in float64."""
  w, b = start.astype(np.float64), np.zeros(num_classes)
  mean, var = np.zeros(w.shape[0]), np.ones(w.shape[0])
  if grid.norm == "fixed":
    rows = views.reshape(-1, w.shape[0])
    mean, var = rows.mean(0), rows.var(0)
  mw, mb = np.zeros_like(w), np.zeros_like(b)
  for epoch in range(grid.epochs):
    x = views[epoch % len(views)]
    n = len(x)
    if grid.norm == "running":
      z = (x - x.mean(0)) / np.sqrt(x.var(0) + grid.epsilon)
      mean = 0.9 * mean + 0.1 * x.mean(0)
      var = 0.9 * var + 0.1 * x.var(0, ddof=1)
    else:
      z = (x - mean) / np.sqrt(var + grid.epsilon) if grid.norm == "fixed" else x
    p = np.exp(z @ w + b)
    p = p / p.sum(1, keepdims=True) - np.eye(num_classes)[y]
    gw, gb = z.T @ p / n + decay * w, p.mean(0)
    if grid.trust is not None:
      gw *= grid.trust * np.linalg.norm(w) / np.linalg.norm(gw)
    if grid.drop_every is not None:
      factor = 0.1 ** (epoch // grid.drop_every)
    elif epoch < grid.warmup_epochs:
      factor = epoch / grid.warmup_epochs
    else:
      done = (epoch - grid.warmup_epochs) / (grid.epochs - grid.warmup_epochs)
      factor = 0.5 * (1 + np.cos(np.pi * done))
    mw, mb = grid.momentum * mw + gw, grid.momentum * mb + gb
    w, b = w - factor * rate * mw, b - factor * rate * mb
  return w, b, mean, var


@pytest.mark.parametrize(
  "change",
  [
    {"norm": "none", "drop_every": 2},
    {"norm": "fixed"},
    {"norm": "running", "trust": 0.01, "warmup_epochs": 2},
  ],
)
def test_training_equals_the_slow_form(blobs, change):
  x, y = blobs
  views = np.stack([x, x[:, ::-1], x + 1])
  g = Grid(learning_rates=(0.3, 0.1), weight_decays=(0.01,), epochs=5, batch_size=len(x), **change)
  still = dataclasses.replace(g, learning_rates=(1e-12,), weight_decays=(0.0,))
  start = grid.train(views, y, num_classes=3, grid=still, seed=3).weight[:, 0]
  assert np.asarray(start).std() == pytest.approx(0.01, rel=0.5)  # of 18 draws
  found = grid.train(views, y, num_classes=3, grid=g, seed=3)
  for i, (rate, decay) in enumerate(g.members):
    w, b, mean, var = slow_train(
      views, y, np.asarray(start), rate=rate, decay=decay, grid=g, num_classes=3
    )
    std = np.ones(6) if g.norm == "none" else np.sqrt(var + g.epsilon)
    # 1e-4: float32 against float64 over five steps at a large rate.
    np.testing.assert_allclose(found.weight[:, i], w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.bias[i], b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.std, std, rtol=1e-5)


def test_the_best_member_on_validation_is_chosen_and_labels_digits():
  x, y = load_digits(return_X_y=True)
  settings = Grid(
    # Decay of 1 at this rate multiplies the weights by -1e6 a step, to infinity and NaN.
    learning_rates=(1e6, 1e-4, 0.1),
    weight_decays=(1.0, 0.0),
    epochs=5,
    batch_size=64,
    norm="fixed",
  )
  fit = grid.fit(x[:900], y[:900], x[900:1200], y[900:1200], num_classes=10, grid=settings, seed=0)
  best = settings.members.index((fit.learning_rate, fit.weight_decay))
  assert fit.accuracies[best] == fit.accuracies.max()
  assert fit.accuracies[0] == 0  # diverged
  assert (fit.learning_rate, fit.weight_decay) == (0.1, 0.0)
  found = grid.predict(fit.head, x[900:1200])
  assert (np.asarray(found) == y[900:1200]).mean() == pytest.approx(fit.accuracies[best])
  assert grid.accuracy(fit.head, x[1200:], y[1200:]) > 0.88


def test_order_and_start_depend_on_the_seed_alone(blobs):
  first, again, other = (
    grid.train(*blobs, num_classes=3, grid=SMALL, seed=seed).weight for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-3


def test_recipes_have_the_published_numbers_on_imagenet():
  ijepa, mae = lars.ijepa(1_281_167), lars.mae(1_281_167)
  assert ijepa.batch_size == mae.batch_size == 16_384
  assert mae.learning_rates == (6.4,) and mae.schedule(78)(0) == 0
  factor = ijepa.schedule(78)
  np.testing.assert_allclose([factor(15 * 78 - 1), factor(15 * 78), factor(3899)], [1, 0.1, 1e-3])
  assert len(ijepa.members) == 6
  assert 60_000 // lars.ijepa(60_000).batch_size == 78
  rates = grid.dinov2().learning_rates
  assert len(rates) == 13 and rates[-1] == pytest.approx(0.4)


def test_lars_recipes_learn_digits():
  x, y = load_digits(return_X_y=True)
  for recipe in (lars.ijepa(900, norm="running"), lars.mae(900, epochs=20, warmup_epochs=2)):
    fit = grid.fit(x[:900], y[:900], x[900:1200], y[900:1200], num_classes=10, grid=recipe, seed=0)
    assert grid.accuracy(fit.head, x[1200:], y[1200:]) > 0.85


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"learning_rates": ()}, "learning_rates must be above 0, at least one"),
    ({"weight_decays": (-1.0,)}, "weight_decays must be 0 or more"),
    ({"norm": "batch"}, "norm='batch' is unknown"),
    ({"warmup_epochs": 3}, "warmup_epochs within the epochs, found 16, 2, 3"),
    ({"drop_every": 1, "warmup_epochs": 1}, "without warmup_epochs"),
    ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
    ({"norm": "running", "batch_size": 1}, "batches of at least 2"),
    ({"batch_size": 51}, "batch_size=51 is more than the 50 training vectors"),
    ({"learning_rates": (1e38,), "weight_decays": (10.0,)}, "every member diverged"),
  ],
)
def test_impossible_settings_say_what_is_wrong(blobs, change, message):
  with pytest.raises(ValueError, match=message):
    settings = dataclasses.replace(SMALL, **change)
    grid.fit(*blobs, *blobs, num_classes=3, grid=settings, seed=0)


def test_impossible_arrays_say_what_is_wrong(blobs):
  x, y = blobs
  with pytest.raises(ValueError, match=r"\[n d\] or \[views n d\], found shape \(6,\)"):
    grid.train(x[0], y[:6], num_classes=3, grid=SMALL, seed=0)
  with pytest.raises(ValueError, match="val_x has 5 features"):
    grid.fit(x, y, x[:, :5], y, num_classes=3, grid=SMALL, seed=0)
  heads = grid.train(x, y, num_classes=3, grid=SMALL, seed=0)
  with pytest.raises(ValueError, match="predict with one member"):
    grid.predict(heads, x)
  with pytest.raises(ValueError, match="less than 2 a batch"):
    lars.mae(100)
