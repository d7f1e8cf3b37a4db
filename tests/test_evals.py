"""Probes against scikit-learn, collapse numbers against slow forms, and feature extraction."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from jepax.core import Features
from jepax.evals import collapse, features, knn, linear, pictures


@pytest.fixture(scope="module")
def digits():
  x, y = load_digits(return_X_y=True)
  return x[:1200], y[:1200], x[1200:], y[1200:]


@pytest.mark.parametrize("k", [1, 20])
def test_euclidean_knn_equals_sklearn_on_digits(digits, k):
  # Digits are integers, so distances are exact in float32 and ties are real ties.
  train_x, train_y, test_x, _ = digits
  peer = KNeighborsClassifier(k).fit(train_x, train_y).predict(test_x)
  found = knn.predict(train_x, train_y, test_x, num_classes=10, k=k, metric="euclidean")
  np.testing.assert_array_equal(found, peer)
  assert found.dtype == jnp.int32


def test_euclidean_knn_survives_a_large_common_offset(digits):
  # |x|^2 of 64 entries near 4096 has no digits left for distances unless the offset is removed.
  train_x, train_y, test_x, _ = digits
  near = knn.predict(train_x, train_y, test_x, num_classes=10, metric="euclidean")
  far = knn.predict(train_x + 4096, train_y, test_x + 4096, num_classes=10, metric="euclidean")
  np.testing.assert_array_equal(near, far)


def slow_cosine_votes(train_x, train_y, test_x, *, num_classes, k, temperature):
  out = []
  for query in test_x:
    lengths = np.linalg.norm(train_x, axis=1) * np.linalg.norm(query)
    cosines = train_x @ query / lengths
    votes = np.zeros(num_classes)
    for i in np.argsort(-cosines, kind="stable")[:k]:
      votes[train_y[i]] += np.exp(cosines[i] / temperature)
    out.append(votes.argmax())
  return np.array(out)


@pytest.mark.parametrize("temperature", [0.07, 0.005])  # exp(1/0.005) overflows float32
def test_cosine_knn_equals_the_slow_form(temperature):
  rng = np.random.default_rng(0)
  train_x, test_x = rng.normal(size=(300, 8)), rng.normal(size=(50, 8))
  train_y = rng.integers(0, 5, size=300)
  settings = {"num_classes": 5, "k": 20, "temperature": temperature}
  want = slow_cosine_votes(train_x, train_y, test_x, **settings)
  found = knn.predict(train_x, train_y, test_x, **settings)
  np.testing.assert_array_equal(found, want)
  plain = knn.predict(train_x, train_y, test_x, num_classes=5, k=20, temperature=1e6)
  assert (plain != want).any(), "the weights must matter, or this test shows nothing"


def test_knn_does_not_depend_on_the_block():
  rng = np.random.default_rng(1)
  train_x, test_x = rng.normal(size=(100, 4)), rng.normal(size=(23, 4))
  train_y = rng.integers(0, 3, size=100)
  whole, blocks = (
    knn.predict(train_x, train_y, test_x, num_classes=3, k=5, block=block) for block in (64, 7)
  )
  assert whole.shape == (23,)
  np.testing.assert_array_equal(whole, blocks)


def test_equal_votes_go_to_the_lower_class():
  train_x = np.array([[1.0, 0.0], [0.0, 1.0]])
  found = knn.predict(
    train_x, np.array([1, 0]), np.array([[1.0, 1.0]]), num_classes=2, k=2, metric="euclidean"
  )
  assert found.tolist() == [0]


def test_knn_accuracy_is_a_share():
  x = np.eye(4)
  wrong_one = np.array([0, 1, 2, 2])
  assert knn.accuracy(x, np.arange(4), x, wrong_one, num_classes=4, k=1) == 0.75


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"k": 11}, "k must lie in 1..10"),
    ({"k": 0}, "k must lie in 1..10"),
    ({"metric": "l1"}, "cosine, euclidean, found 'l1'"),
    ({"temperature": 0.0}, "temperature must be above 0"),
    ({"temperature": float("nan")}, "temperature must be above 0"),
    ({"train_x": [1.0, 2.0]}, r"found shape \(2,\)"),
    ({"num_classes": 2}, r"0..1 for num_classes=2, found 0..2"),
    ({"train_y": np.zeros(9, int)}, r"shape \(10,\), one label a sample, found \(9,\)"),
    ({"train_y": np.zeros(10)}, "must hold integers, found dtype float64"),
    ({"test_x": np.ones((2, 3))}, "has 3 features a sample and the training features have 4"),
    ({"train_x": np.ones((10, 2, 2))}, "Pool or flatten"),
  ],
)
def test_knn_says_what_is_wrong(change, message):
  arguments = {
    "train_x": np.ones((10, 4)),
    "train_y": np.arange(10) % 3,
    "test_x": np.ones((2, 4)),
    "num_classes": 3,
    "k": 5,
  }
  with pytest.raises(ValueError, match=message):
    knn.predict(**(arguments | change))


# Linear probe


@pytest.mark.parametrize("standardize", [True, False])
def test_linear_probe_equals_sklearn_on_digits(digits, standardize):
  train_x, train_y, test_x = digits[0] / 16, digits[1], digits[2] / 16
  scaler = StandardScaler(with_mean=standardize, with_std=standardize).fit(train_x)
  peer = LogisticRegression(C=0.5, max_iter=5000, tol=1e-8)
  peer.fit(scaler.transform(train_x), train_y)
  settings = {"C": 0.5, "standardize": standardize, "tolerance": 1e-5}
  probe = linear.fit(train_x, train_y, num_classes=10, **settings)
  assert probe.slope <= 1e-5
  found = linear.predict(probe, test_x)
  np.testing.assert_array_equal(found, peer.predict(scaler.transform(test_x)))
  # The tolerance bounds the gradient; in flat directions it leaves 1e-3 in weights up to 2.
  np.testing.assert_allclose(probe.weight.T, peer.coef_, atol=5e-3)


def test_linear_probe_ignores_scale_and_offset_when_standardised(digits):
  train_x, train_y, test_x, test_y = digits
  scale = np.random.default_rng(0).uniform(0.01, 100, size=64)
  plain = linear.accuracy(train_x, train_y, test_x, test_y, num_classes=10)
  moved = linear.accuracy(
    train_x * scale + 5 * scale, train_y, test_x * scale + 5 * scale, test_y, num_classes=10
  )
  # Rounding may flip the one or two of 597 that lie on a boundary.
  assert abs(plain - moved) <= 2 / 597
  assert plain > 0.9


def test_linear_probe_stops_at_max_steps_and_says_so(digits):
  train_x, train_y, *_ = digits
  probe = linear.fit(train_x, train_y, num_classes=10, max_steps=2)
  assert probe.steps == 2
  assert probe.slope > 1e-4


def test_linear_probe_keeps_a_constant_feature_harmless():
  rng = np.random.default_rng(0)
  x = np.concatenate([rng.normal(size=(60, 2)), np.full((60, 1), 1e4)], axis=1)
  y = (x[:, 0] > 0).astype(int)
  probe = linear.fit(x, y, num_classes=2)
  assert np.abs(probe.weight[2]).max() < 1e-3
  assert (np.asarray(linear.predict(probe, x)) == y).mean() > 0.95


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"C": 0.0}, "C and tolerance must be above 0"),
    ({"C": float("nan")}, "C and tolerance must be above 0"),
    ({"num_classes": 1}, "num_classes must be at least 2, found 1"),
    ({"train_y": np.array([0, 1, 5])}, r"found 0..5"),
  ],
)
def test_linear_probe_says_what_is_wrong(change, message):
  arguments = {"train_x": np.eye(3), "train_y": np.array([0, 1, 1]), "num_classes": 2}
  with pytest.raises(ValueError, match=message):
    linear.fit(**(arguments | change))


# Collapse


def slow_numbers(z):
  z = z.astype(np.float64)
  unit = z / np.linalg.norm(z, axis=1, keepdims=True)
  cosines = unit @ unit.T

  def rankme(x):
    s = np.linalg.svd(x, compute_uv=False)
    p = s / s.sum() + 1e-7
    return np.exp(-(p * np.log(p)).sum())

  return {
    "feature_std": z.std(0).mean(),
    "rankme": rankme(z),
    "rankme_centred": rankme(z - z.mean(0)),
    "cosine": cosines[~np.eye(len(z), dtype=bool)].mean(),
  }


@pytest.mark.parametrize("shape", [(200, 12), (12, 40)])
def test_numbers_equal_the_slow_form(shape):
  z = np.random.default_rng(0).normal(size=shape) * np.linspace(0.2, 2, shape[1]) + 0.3
  found, want = collapse.numbers(z), slow_numbers(z)
  assert found.keys() == want.keys()
  for name in want:  # centred, 12 samples span 11 axes; the 12th is rounding, hence 1e-3
    assert found[name] == pytest.approx(want[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(("rank", "low", "high"), [(64, 63, 64), (8, 7.5, 8), (1, 1, 1.01)])
def test_rankme_counts_dimensions(rank, low, high):
  rng = np.random.default_rng(0)
  z = rng.normal(size=(2048, rank)) @ np.linalg.qr(rng.normal(size=(64, rank)))[0].T
  assert low <= collapse.numbers(z)["rankme"] <= high


def toy_encoder(*, stop_gradient, steps):
  """y = .8 x + .6 noise, one encoder for both, its output predicted under plain MSE."""
  sizes = {"encoder": (32, 64, 32), "predictor": (32, 32, 32)}
  init = jax.nn.initializers.lecun_normal()
  keys = iter(jax.random.split(jax.random.key(0), 4))
  params = {
    name: [{"w": init(next(keys), io), "b": jnp.zeros(io[1])} for io in itertools.pairwise(size)]
    for name, size in sizes.items()
  }
  tx = optax.adamw(3e-3)

  def mlp(layers, x):
    x = jax.nn.relu(x @ layers[0]["w"] + layers[0]["b"])
    return x @ layers[1]["w"] + layers[1]["b"]

  def loss(params, key):
    x, noise = jax.random.normal(key, (2, 64, 32))
    target = mlp(params["encoder"], 0.8 * x + 0.6 * noise)
    target = jax.lax.stop_gradient(target) if stop_gradient else target
    return jnp.square(mlp(params["predictor"], mlp(params["encoder"], x)) - target).mean()

  def step(state, key):
    params, opt_state = state
    updates, opt_state = tx.update(jax.grad(loss)(params, key), opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None

  keys = jax.random.split(jax.random.key(1), steps)
  (params, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, keys))((params, tx.init(params)))
  return mlp(params["encoder"], jax.random.normal(jax.random.key(2), (512, 32)))


def test_alarm_fires_on_the_toy_that_collapses_and_not_on_its_control():
  collapsed = collapse.numbers(toy_encoder(stop_gradient=False, steps=2000))
  assert collapsed["feature_std"] < 0.01
  message = collapse.alarm("target", collapsed, dim=32)
  assert message.startswith("target encoder: complete collapse")
  assert f"{collapsed['feature_std']:.2g}" in message

  healthy = collapse.numbers(toy_encoder(stop_gradient=True, steps=300))
  assert collapse.alarm("target", healthy, dim=32) is None


def test_alarm_is_silent_on_the_narrow_cone_of_a_fresh_network():
  # As measured on fresh ViTs: one direction common to all, a spread of 2 %, in a few axes.
  rng = np.random.default_rng(0)
  common = rng.choice([-1.0, 1.0], size=96)
  spread = 0.7 ** np.arange(8) * rng.normal(size=(300, 8)) @ rng.normal(size=(8, 96))
  numbers = collapse.numbers(common + 0.015 * spread)
  assert 0.01 < numbers["feature_std"] < 0.03
  assert numbers["cosine"] > 0.999
  assert numbers["rankme"] < 2
  assert collapse.alarm("online", numbers, dim=96) is None


def test_alarm_on_features_that_are_constant_zero_or_not_finite():
  for z in (np.ones((20, 8)), np.zeros((20, 8))):
    assert "complete collapse" in collapse.alarm("online", collapse.numbers(z), dim=8)
  z = np.full((20, 8), np.nan)
  assert "not finite" in collapse.alarm("online", collapse.numbers(z), dim=8)


def test_alarm_is_silent_on_small_but_isotropic_features():
  z = 1e-3 * np.random.default_rng(0).normal(size=(200, 16))
  assert collapse.alarm("online", collapse.numbers(z), dim=16) is None


def test_alarm_on_a_target_that_stands_still_or_is_lost_or_is_no_average():
  z = np.random.default_rng(0).normal(size=(200, 16))
  fresh, moved = collapse.numbers(z), collapse.numbers(1.001 * z)
  assert "has not moved" in collapse.alarm("target", fresh, dim=16, control=fresh)
  for distance, text in ((0.0, "equals the online"), (1.2, "no longer follows"), (0.3, None)):
    found = collapse.alarm("target", moved | {"ema_distance": distance}, dim=16, control=fresh)
    assert found is None if text is None else text in found


def test_ema_distance():
  online = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
  target = online | {"a": jnp.zeros(2)}
  assert float(collapse.ema_distance(target, online)) == pytest.approx(3 / 5)


def test_alarm_names_dimensional_collapse_alone_and_beside_a_control():
  rng = np.random.default_rng(0)
  line = rng.normal(size=(200, 1)) * rng.normal(size=(1, 32))
  message = collapse.alarm("online", collapse.numbers(line), dim=32, count=200)
  assert message.startswith("online encoder: dimensional collapse")
  two = collapse.numbers(rng.normal(size=(2, 32)))  # which differ in one direction, always
  assert collapse.alarm("online", two, dim=32, count=2) is None
  assert "of 32 dimensions" in message

  three = collapse.numbers(rng.normal(size=(200, 3)) @ rng.normal(size=(3, 32)))
  control = collapse.numbers(rng.normal(size=(200, 32)))
  assert collapse.alarm("online", three, dim=32) is None
  beside = collapse.alarm("online", three, dim=32, control=control)
  assert "dimensional collapse" in beside
  assert f"random initialisation has {control['rankme_centred']:.1f}" in beside


def test_numbers_need_two_samples():
  with pytest.raises(ValueError, match="at least 2, found 1"):
    collapse.numbers(np.ones((1, 4)))


# Features


def images(count):
  return np.random.default_rng(0).integers(0, 256, size=(count, 4, 4, 1), dtype=np.uint8)


@pytest.mark.parametrize("count", [3, 8, 11])
def test_extract_keeps_order_and_compiles_one_shape(count):
  traces = []

  @jax.jit
  def encode(x):
    traces.append(x.shape)
    tokens = x.reshape(x.shape[0], 4, 4).astype(jnp.float32)
    return Features(tokens=tokens, pooled=tokens.mean(1))

  x = images(count)
  pooled = features.extract(encode, x, batch_size=4)
  np.testing.assert_allclose(pooled, x.reshape(count, 4, 4).mean(1), rtol=1e-6)  # f32 rounding
  tokens = features.extract_tokens(encode, x, batch_size=4)
  np.testing.assert_array_equal(tokens, x.reshape(count, 4, 4))
  assert traces == [(4, 4, 4, 1)]


def test_pixels_lie_between_0_and_1():
  x = images(5)
  flat = features.pixels(x)
  assert flat.shape == (5, 16)
  assert flat.dtype == np.float32
  np.testing.assert_array_equal(np.rint(flat * 255).astype(np.uint8), x.reshape(5, 16))


def test_extract_says_what_is_wrong():
  with pytest.raises(ValueError, match=r"found shape \(0, 4, 4, 1\)"):
    features.extract(lambda x: x, images(0), batch_size=4)
  with pytest.raises(ValueError, match=r"must be uint8 in 0\.\.255, found float32"):
    features.extract(lambda x: x, images(2).astype(np.float32), batch_size=4)
  with pytest.raises(ValueError, match="batch_size must be at least 1"):
    features.extract(lambda x: x, images(2), batch_size=0)


# Pictures


def test_nearest_orders_by_cosine_not_by_length():
  bank = np.array([[1.0, 0.0], [0.0, 9.0], [5.0, 5.0]])
  found = pictures.nearest(np.array([[2.0, 0.1]]), bank, k=3)
  assert found.tolist() == [[0, 2, 1]]
  with pytest.raises(ValueError, match=r"k must lie in 1\.\.3"):
    pictures.nearest(bank, bank, k=4)


def test_embed2d_finds_the_two_widest_axes():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(300, 2)) * [10, 3]
  axes = np.linalg.qr(rng.normal(size=(20, 2)))[0].T
  x = scores @ axes + 0.01 * rng.normal(size=(300, 20)) + 7
  found = pictures.embed2d(x.astype(np.float32))
  correlation = np.corrcoef(found.T, scores.T)[:2, 2:]
  np.testing.assert_allclose(np.abs(np.diag(correlation)), 1, atol=1e-2)  # sample correlation
  np.testing.assert_array_equal(found, pictures.embed2d(x.astype(np.float32)))


def test_patch_pca_gives_like_patches_like_colours():
  rng = np.random.default_rng(0)
  kinds = rng.normal(size=(4, 16))
  kind = np.tile(np.arange(4), (3, 6))[:, :24]  # 3 images of 4 x 6 patches
  tokens = kinds[kind] + 1e-4 * rng.normal(size=(3, 24, 16))
  colours = pictures.patch_pca(tokens.astype(np.float32), (4, 6)).reshape(-1, 3).astype(int)
  kind = kind.ravel()
  for a in range(4):
    assert np.ptp(colours[kind == a], axis=0).max() <= 2  # the noise is 1e-4 of the spread
    for b in range(a):
      assert np.abs(colours[kind == a][0] - colours[kind == b][0]).max() > 30
  with pytest.raises(ValueError, match="drop class and register tokens"):
    pictures.patch_pca(np.zeros((1, 25, 16), np.float32), (4, 6))


def test_large_images_are_shrunk_for_the_pixel_baseline():
  """A probe on the 150,528 values of a 224-pixel image would need a 90 GB covariance."""
  images = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8)
  found = features.pixels(images).reshape(2, 32, 32, 3)
  wanted = images.reshape(2, 32, 2, 32, 3, 3).mean((2, 4)) / 255
  np.testing.assert_allclose(found, wanted, atol=1.01 / 255)  # rounded after each axis
  small = images[:, :28, :28]
  np.testing.assert_array_equal(
    features.pixels(small).reshape(small.shape), small / np.float32(255)
  )
