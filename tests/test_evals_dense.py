"""Dense heads on tokens that hold the answer, and their losses and scores against slow forms."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepax.data import scenes
from jepax.evals import dense, depth, segmentation

GRID = (3, 4)
QUICK = {"steps": 150, "batch_size": 8, "warmup": 10, "learning_rate": 0.03}
DEPTH = QUICK | {"grid": GRID, "bins": 32, "steps": 300}


def rng(seed=0):
  return np.random.default_rng(seed)


def coded(classes, *, width=6, seed=1):
  """Tokens f32[n t d] that hold each patch's class as a direction, with an offset and noise."""
  codes = rng(seed).normal(size=(classes.max() + 1, width))
  tokens = codes[classes] + 0.05 * rng(2).normal(size=(*classes.shape, width)) + 3
  return tokens.reshape(len(classes), -1, width).astype(np.float32)


# What the heads share


def slow_resize(x, size):
  """Bilinear with pixel centres at halves, coordinates clamped to the image, one pixel a time."""
  rows, columns = x.shape
  out = np.zeros(size)
  for i, j in np.ndindex(*size):
    y = np.clip((i + 0.5) * rows / size[0] - 0.5, 0, rows - 1)
    z = np.clip((j + 0.5) * columns / size[1] - 0.5, 0, columns - 1)
    top, left = min(int(y), rows - 2), min(int(z), columns - 2)
    for a, b in itertools.product((0, 1), (0, 1)):
      out[i, j] += x[top + a, left + b] * (1 - abs(top + a - y)) * (1 - abs(left + b - z))
  return out


@pytest.mark.parametrize("size", [(12, 16), (7, 9), (2, 3)])
def test_resize_is_bilinear_at_half_pixel_centres(size):
  x = rng().normal(size=GRID).astype(np.float32)
  found = dense.resize(x[None, :, :, None], size)[0, :, :, 0]
  np.testing.assert_allclose(found, slow_resize(x, size), atol=1e-6)  # float32 sums


def quadratic(linear, tokens, maps, step):
  """A loss that the loop below can redo by hand."""
  del step
  return jnp.square(linear(tokens, (1, 2)) - maps[..., None]).mean()


@pytest.mark.parametrize("optimizer", dense.OPTIMIZERS)
def test_training_equals_a_plain_loop(optimizer):
  tokens = rng().normal(size=(6, 2, 3)).astype(np.float32) * [1, 5, 0.1] + 2
  maps = rng(1).normal(size=(6, 1, 2)).astype(np.float32)
  settings = {"steps": 7, "learning_rate": 0.1, "weight_decay": 0.05, "warmup": 2}
  layer, losses = dense.train(
    tokens, maps, loss=quadratic, outputs=1, batch_size=6, optimizer=optimizer, seed=0, **settings
  )
  flat = tokens.reshape(12, 3).astype(np.float64)
  np.testing.assert_allclose(layer.mean, flat.mean(0), rtol=1e-5)  # float32 sums
  np.testing.assert_allclose(layer.std, flat.std(0), rtol=1e-5)
  x = (flat - flat.mean(0)) / flat.std(0)
  weight = rng(0).normal(scale=0.01, size=(3, 1))
  rates = [0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1] * (1 - np.arange(7) / 7)
  w, seen, momentum = np.append(weight[:, 0], 0), [], [np.zeros(4), np.zeros(4)]
  x1, decay = np.append(x, np.ones((12, 1)), axis=1), 0.05 * np.array([1, 1, 1, 0])
  for i, rate in enumerate(rates):
    error = x1 @ w - maps.reshape(12)
    seen.append(np.square(error).mean())
    grad = 2 * x1.T @ error / 12
    if optimizer == "sgd":
      momentum[0] = 0.9 * momentum[0] + grad + decay * w
      w = w - rate * momentum[0]
    else:
      momentum[0] = 0.9 * momentum[0] + 0.1 * grad
      momentum[1] = 0.999 * momentum[1] + 0.001 * grad**2
      first, second = momentum[0] / (1 - 0.9 ** (i + 1)), momentum[1] / (1 - 0.999 ** (i + 1))
      w = w - rate * (first / (np.sqrt(second) + 1e-8) + decay * w)
  np.testing.assert_allclose(losses, seen, rtol=1e-4)  # float32 over 7 steps
  np.testing.assert_allclose(np.append(layer.weight, layer.bias), w, rtol=1e-4, atol=1e-5)


def test_every_epoch_sees_every_row_once():
  order = dense._order(rng(), 10, steps=9, batch_size=3)
  assert order.shape == (9, 3)
  for epoch in order.reshape(3, 9):
    assert len(set(epoch)) == 9  # the tenth is left out, another one each time
  assert (order[:3] != order[3:6]).any()


def test_training_twice_compiles_once_and_gives_the_same():
  classes = rng().integers(0, 4, size=(16, *GRID))
  settings = QUICK | {"grid": GRID, "num_classes": 4}
  first = segmentation.fit(coded(classes), classes, **settings)
  size = dense._train._cache_size()
  again = segmentation.fit(coded(classes), classes, **settings)
  other = segmentation.fit(coded(classes), classes, **(settings | {"seed": 1, "warmup": 5}))
  assert dense._train._cache_size() == size
  np.testing.assert_array_equal(first.linear.weight, again.linear.weight)
  assert (first.linear.weight != other.linear.weight).any()


# Segmentation


def test_segmentation_finds_what_tokens_hold():
  train, test = rng().integers(0, 4, size=(2, 16, *GRID))
  head = segmentation.fit(coded(train), train, grid=GRID, num_classes=4, **QUICK)
  assert head.losses.shape == (150,)
  assert head.losses[-1] < 0.05 < head.losses[0]
  assert segmentation.score(head, coded(test), test) == {"miou": 1.0, "pixel_accuracy": 1.0}
  found = segmentation.predict(head, coded(test), size=GRID, batch_size=7)
  np.testing.assert_array_equal(found, test)
  assert found.dtype == np.int32
  noise = rng(5).normal(size=(16, 12, 6)).astype(np.float32)
  assert segmentation.score(head, noise, test)["miou"] < 0.4


def test_segmentation_reads_pixels_by_upsampled_logits():
  halves = np.tile(np.repeat([0, 1], 2), (16, 3, 1))  # a boundary between columns 1 and 2
  halves[8:] = 1 - halves[8:]
  pixels = np.repeat(np.repeat(halves, 5, axis=1), 5, axis=2)
  head = segmentation.fit(coded(halves), pixels, grid=GRID, num_classes=2, **QUICK)
  # Logits of opposite sign cross zero half-way between patch centres: at the boundary.
  assert segmentation.score(head, coded(halves), pixels)["pixel_accuracy"] > 0.99
  logits = head.linear(coded(halves)[:1], GRID)[0]
  difference = np.asarray(logits[..., 1] - logits[..., 0])
  found = segmentation.predict(head, coded(halves)[:1], size=(9, 14))[0]
  np.testing.assert_array_equal(found, slow_resize(difference, (9, 14)) > 0)


def test_ignored_pixels_count_nowhere():
  classes = rng().integers(0, 4, size=(16, *GRID))
  spoilt = np.where(rng(3).uniform(size=classes.shape) < 0.6, 255, classes)
  head = segmentation.fit(coded(classes), spoilt, grid=GRID, num_classes=4, **QUICK)
  assert segmentation.score(head, coded(classes), spoilt)["pixel_accuracy"] == 1
  assert segmentation.score(head, coded(classes), classes)["pixel_accuracy"] == 1


def test_cross_entropy_equals_the_slow_form():
  logits = rng().normal(size=(2, 3, 4, 5)).astype(np.float32)
  maps = rng(1).integers(0, 5, size=(2, 3, 4))
  maps[0, 1] = 9
  each = [
    np.log(np.exp(logits[i].astype(np.float64)).sum()) - logits[i][maps[i]]
    for i in np.ndindex(2, 3, 4)
    if maps[i] != 9
  ]
  found = segmentation.cross_entropy(logits, maps, ignore=9)
  assert found == pytest.approx(np.mean(each), rel=1e-6)  # float32 sums
  assert segmentation.cross_entropy(logits, np.full_like(maps, 9), ignore=9) == 0


def test_confusion_and_scores_by_hand():
  truth = np.array([[[0, 0, 1], [1, 9, 9]]])
  found = np.array([[[0, 1, 1], [1, 2, 0]]])
  table = segmentation.confusion(truth, found, num_classes=4, ignore=9)
  assert table.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
  assert table.dtype == np.int64


def test_miou_averages_over_the_classes_that_occur():
  classes = np.zeros((16, *GRID), int)
  classes[8:] = 1
  head = segmentation.fit(coded(classes), classes, grid=GRID, num_classes=4, **QUICK)
  truth = classes.copy()
  truth[0, 0] = 2  # 4 of 192 pixels, found as 0; nothing is 3
  found = segmentation.score(head, coded(classes), truth)
  assert found["miou"] == pytest.approx((92 / 96 + 1 + 0) / 3)
  assert found["pixel_accuracy"] == pytest.approx(188 / 192)


# Depth


def told_depths():
  """Depths f64[48 rows columns] and tokens that hold them, f32[48 t 6]."""
  true = rng().uniform(1, 9, size=(48, *GRID))
  mixed = np.stack([true, np.square(true)], axis=-1) @ rng(1).normal(size=(2, 6))
  return mixed.reshape(48, 12, 6).astype(np.float32), true


def test_depth_finds_what_tokens_hold():
  tokens, true = told_depths()
  head = depth.fit(tokens[:32], true[:32], **DEPTH)
  found = depth.score(head, tokens[32:], true[32:])
  assert head.median == pytest.approx(np.median(true[:32]))
  assert found["rmse"] < 0.35 * found["median_rmse"]
  assert found["abs_rel"] < 0.35 * found["median_abs_rel"]
  assert found["delta1"] > 0.9 > found["median_delta1"]
  predicted = depth.predict(head, tokens, size=(6, 8), batch_size=13)
  assert predicted.shape == (48, 6, 8)
  assert predicted.dtype == np.float32
  assert head.low <= predicted.min() < predicted.max() <= head.high


def test_depth_scores_by_hand():
  true = np.array([[[2.0, 4.0]], [[8.0, 0.0]], [[0.0, np.nan]]])  # the third is unknown
  known = np.array([[[True, True]], [[True, False]], [[False, False]]])
  found = np.array([[[2.0, 5.0]], [[4.0, 9.0]], [[1.0, 1.0]]])
  errors = depth._errors(found, true, known)
  assert errors["rmse"] == pytest.approx((np.sqrt(0.5) + 4) / 2)
  assert errors["abs_rel"] == pytest.approx((0.125 + 0.5) / 2)
  assert errors["delta1"] == pytest.approx((0.5 + 0) / 2)  # 5 / 4 is not under 1.25


def test_expected_depth_equals_the_slow_form():
  logits = rng().normal(size=(5, 7)).astype(np.float32)
  bins = [2 + 6 * i / 6 for i in range(7)]
  for row, found in zip(logits, depth.expected(logits, low=2, high=8), strict=True):
    weight = [max(x, 0) + 0.1 for x in row]
    want = sum(w * b for w, b in zip(weight, bins, strict=True)) / sum(weight)
    assert found == pytest.approx(want, rel=1e-6)  # float32 sums


def test_losses_equal_the_slow_form_and_ignore_the_unknown():
  error = rng().normal(size=(2, 9, 8)).astype(np.float32)
  known = rng(1).uniform(size=error.shape) < 0.8
  hidden = np.where(known, error, np.nan)
  sig_loss = jax.jit(depth.sig_loss)
  e = error[known].astype(np.float64)
  want = np.sqrt(e.var(ddof=1) + 0.15 * e.mean() ** 2)
  assert sig_loss(hidden, known, mean_only=False) == pytest.approx(want, rel=1e-5)
  want = np.sqrt(0.15) * abs(e.mean())
  assert sig_loss(hidden, known, mean_only=True) == pytest.approx(want, rel=1e-5)

  want = 0
  for stride in (1, 2, 4, 6):
    g, k = error[:, ::stride, ::stride].astype(np.float64), known[:, ::stride, ::stride]
    pairs = 0
    for b, i, j in np.argwhere(k):
      for other in ((b, i + 2, j), (b, i, j + 2)):
        if other[1] < k.shape[1] and other[2] < k.shape[2] and k[other]:
          pairs += abs(g[other] - g[b, i, j])
    want += pairs / k.sum()
  assert jax.jit(depth.gradient_loss)(hidden, known) == pytest.approx(want, rel=1e-5)


def test_losses_of_perfect_and_of_unknown_depths_have_finite_gradients():
  def loss(error, known):
    return depth.sig_loss(error, known, mean_only=False) + depth.gradient_loss(error, known)

  for known in (np.ones((1, 4, 4), bool), np.zeros((1, 4, 4), bool)):
    value, grad = jax.jit(jax.value_and_grad(loss))(jnp.zeros((1, 4, 4)), known)
    assert value == 0
    assert np.isfinite(grad).all()


def test_depth_trains_on_known_pixels_alone():
  tokens, true = (x[:32] for x in told_depths())
  spoilt = np.where(rng(2).uniform(size=true.shape) < 0.3, np.nan, true)
  first = depth.fit(tokens, spoilt, **DEPTH)
  again = depth.fit(tokens, np.where(np.isnan(spoilt), 99, spoilt), **DEPTH)
  np.testing.assert_array_equal(first.linear.weight, again.linear.weight)
  assert depth.score(first, tokens, true)["delta1"] > 0.9


def test_depth_weighs_the_gradient_loss():
  tokens, true = (x[:8] for x in told_depths())
  losses = [
    depth.fit(tokens, true, **(DEPTH | {"gradient_weight": w, "steps": 11})).losses[0]
    for w in (0.0, 0.5)
  ]
  # Bins as good as equal at first: the error's differences are those of the true logarithm.
  log = np.log(true + depth.FLOOR)
  across = np.abs(log[:, 2:] - log[:, :-2]).sum() + np.abs(log[:, :, 2:] - log[:, :, :-2]).sum()
  assert losses[1] - losses[0] == pytest.approx(0.5 * across / true.size, rel=0.05)


# On rendered scenes


def patches(images, side):
  """Tokens that a patchwise linear encoder could have: pixels, and where the patch is."""
  n, h, w, c = images.shape
  cut = images.reshape(n, h // side, side, w // side, side, c).swapaxes(2, 3)
  flat = cut.reshape(n, -1, side * side * c).astype(np.float32) / 255
  place = np.broadcast_to(np.eye(flat.shape[1], dtype=np.float32), (n, *[flat.shape[1]] * 2))
  return np.concatenate([flat, place], axis=2)


def test_heads_beat_constants_on_rendered_scenes():
  found = scenes.spheres(64, seed=0, size=32)
  tokens, grid = patches(found.image, 8), (4, 4)
  settings = {"grid": grid, "steps": 200, "batch_size": 16, "warmup": 10}
  head = depth.fit(tokens[:48], found.depth[:48], bins=32, learning_rate=0.01, **settings)
  result = depth.score(head, tokens[48:], found.depth[48:])
  assert result["rmse"] < 0.8 * result["median_rmse"]
  head = segmentation.fit(
    tokens[:48], found.segment[:48], num_classes=3, learning_rate=0.01, **settings
  )
  constant = np.bincount(found.segment[48:].ravel()).max() / found.segment[48:].size
  assert (
    segmentation.score(head, tokens[48:], found.segment[48:])["pixel_accuracy"] > constant + 0.2
  )


@pytest.mark.parametrize(
  ("module", "change", "message"),
  [
    (segmentation, {"tokens": np.ones((2, 13, 5))}, "drop class and register tokens"),
    (segmentation, {"maps": np.zeros((3, 3, 4), int)}, "maps must be .* with n = 2"),
    (segmentation, {"maps": np.zeros((2, 3, 4))}, "must hold integers, found dtype float64"),
    (segmentation, {"maps": np.full((2, 3, 4), 3)}, r"labels in 0..2 .* found 3..3"),
    (segmentation, {"maps": np.full((2, 3, 4), 255)}, "found no other label than 255"),
    (segmentation, {"num_classes": 1}, "num_classes must be at least 2"),
    (segmentation, {"optimizer": "lars"}, "adamw, sgd, found 'lars'"),
    (segmentation, {"steps": 0}, "steps and batch_size must be at least 1"),
    (segmentation, {"steps": 100}, r"warmup must lie in 0..99"),
    (depth, {"maps": np.full((2, 3, 4), 500.0)}, r"hold no depth in 0.001..10; is the unit right"),
    (depth, {"low": 0.0}, "0 < low < high"),
    (depth, {"bins": 1}, "2 bins or more"),
  ],
)
def test_heads_say_what_is_wrong(module, change, message):
  arguments = {"tokens": np.ones((2, 12, 5)), "grid": GRID}
  if module is segmentation:
    arguments |= {"maps": np.zeros((2, 3, 4), int), "num_classes": 3}
  else:
    arguments |= {"maps": np.ones((2, 3, 4))}
  arguments |= change
  with pytest.raises(ValueError, match=message):
    module.fit(arguments.pop("tokens"), arguments.pop("maps"), **arguments)


def test_scores_say_what_is_wrong():
  classes = np.zeros((16, *GRID), int)
  head = segmentation.fit(coded(classes), classes, grid=GRID, num_classes=4, **QUICK)
  with pytest.raises(ValueError, match="have 5 features each and the training tokens had 6"):
    segmentation.predict(head, np.ones((2, 12, 5)), size=GRID)
  with pytest.raises(ValueError, match="found no other label than 255"):
    segmentation.score(head, coded(classes), np.full_like(classes, 255))
