"""DINOv2's losses against slow loops in float64, and on eight devices."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepax import losses_dino, sharding
from jepax.models.heads import DinoHead

RTOL = 2e-5  # float32, logits divided by temperatures of about 0.05


def normal(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
  x = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


# --- teachers -------------------------------------------------------------------------------


def slow_sinkhorn(logits: np.ndarray, temperature: float, iterations: int = 3) -> np.ndarray:
  """SwaV's form, with its factors 1 / K and 1 / B: [B K] -> [B K]."""
  q = np.exp(logits.astype(np.float64) / temperature).T
  k, b = q.shape
  q /= q.sum()
  for _ in range(iterations):
    q = q / q.sum(1, keepdims=True) / k
    q = q / q.sum(0, keepdims=True) / b
  return (q * b).T


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn(iterations):
  logits = 0.3 * normal(4, 2, 5)
  found = losses_dino.sinkhorn(logits, temperature=0.07, iterations=iterations)
  expected = slow_sinkhorn(logits.reshape(8, 5), 0.07, iterations)
  np.testing.assert_allclose(found.reshape(8, 5), expected, rtol=1e-4, atol=1e-6)


def test_sinkhorn_balances_and_never_overflows():
  found = losses_dino.sinkhorn(100 * normal(64, 4), temperature=0.04, iterations=200)
  np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
  assert np.isfinite(found).all()
  shared = losses_dino.sinkhorn(0.1 * normal(64, 4), temperature=0.1, iterations=50).sum(0)
  np.testing.assert_allclose(shared, 16, rtol=1e-3)  # the columns converge


def test_sinkhorn_ignores_rows_that_are_not_valid():
  logits, valid = 0.3 * normal(9, 5), np.arange(9) % 3 < 2
  found = losses_dino.sinkhorn(logits, temperature=0.07, valid=jnp.asarray(valid))
  expected = slow_sinkhorn(logits[valid], 0.07)
  np.testing.assert_allclose(found[valid], expected, rtol=1e-4, atol=1e-6)
  none = losses_dino.sinkhorn(logits, temperature=0.07, valid=jnp.zeros(9, bool))
  assert np.isfinite(none).all()


def test_softmax_centered_and_the_center():
  logits, center = normal(6, 2, 5), normal(5, seed=1)
  found = losses_dino.softmax_centered(logits, jnp.asarray(center), temperature=0.5)
  np.testing.assert_allclose(found, softmax((logits - center) / 0.5), rtol=RTOL)

  valid = np.arange(12).reshape(6, 2) % 5 > 1
  moved = losses_dino.moved_center(center, logits, valid=valid, momentum=0.9)
  np.testing.assert_allclose(moved, 0.9 * center + 0.1 * logits[valid].mean(0), rtol=RTOL)
  for _ in range(3):  # by hand, three steps
    center = 0.9 * center + 0.1 * logits.reshape(-1, 5).mean(0)
  three = normal(5, seed=1)
  for _ in range(3):
    three = losses_dino.moved_center(three, logits)
  np.testing.assert_allclose(three, center, rtol=RTOL)
  still = losses_dino.moved_center(center, logits, valid=np.zeros((6, 2), bool))
  np.testing.assert_array_equal(still, center.astype(np.float32))


# --- students -------------------------------------------------------------------------------


def cross_entropy(targets: np.ndarray, logits: np.ndarray) -> float:
  return float(-(targets * np.log(softmax(logits / 0.1))).sum())


def test_dino_is_the_mean_over_pairs_of_different_crops():
  targets, logits = softmax(normal(3, 2, 5)).astype(np.float32), normal(3, 6, 5, seed=1)
  pairs = [
    np.mean([cross_entropy(targets[i, t], logits[i, s]) for i in range(3)])
    for t in range(2)
    for s in range(6)
    if s != t
  ]
  np.testing.assert_allclose(losses_dino.dino(targets, logits), np.mean(pairs), rtol=RTOL)


def test_dino_is_the_published_sum_of_local_and_global():
  """Global: the teacher's crops swapped, twice the mean over 2b; local: every pair; all / 10."""
  b, k, crops = 3, 5, 4
  targets, logits = softmax(normal(b, 2, k)).astype(np.float32), normal(b, 2 + crops, k, seed=1)
  count = 2 * crops + 2
  swapped = targets[:, ::-1]
  globals_ = np.mean(
    [[cross_entropy(swapped[i, v], logits[i, v]) for v in (0, 1)] for i in range(b)]
  )
  locals_ = sum(
    np.mean([cross_entropy(targets[i, t], logits[i, 2 + s]) for i in range(b)])
    for t in (0, 1)
    for s in range(crops)
  )
  expected = (2 * globals_ + locals_) / count
  np.testing.assert_allclose(losses_dino.dino(targets, logits), expected, rtol=RTOL)


def test_ibot():
  targets, logits = softmax(normal(3, 2, 4, 5)).astype(np.float32), normal(3, 2, 4, 5, seed=1)
  sizes = np.array([[4, 0], [1, 2], [0, 3]])
  valid = np.arange(4) < sizes[..., None]
  expected = 0.0
  for i, j in np.ndindex(3, 2):
    for t in range(sizes[i, j]):
      expected += cross_entropy(targets[i, j, t], logits[i, j, t]) / sizes[i, j] / 6
  np.testing.assert_allclose(losses_dino.ibot(targets, logits, valid, crops=6), expected, rtol=RTOL)
  assert losses_dino.ibot(targets, logits, np.zeros_like(valid), crops=6) == 0


def slow_koleo(x: np.ndarray) -> float:
  x = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
  total = 0.0
  for i in range(len(x)):
    others = [j for j in range(len(x)) if j != i]
    nearest = max(others, key=lambda j: x[i] @ x[j])
    total -= np.log(np.linalg.norm(x[i] - x[nearest] + 1e-8) + 1e-8)
  return total / len(x)


@pytest.mark.parametrize("group", [None, 4])
def test_koleo(group):
  x = normal(8, 6)
  parts = [x] if group is None else [x[:4], x[4:]]
  expected = np.mean([slow_koleo(part) for part in parts])
  np.testing.assert_allclose(losses_dino.koleo(x, group=group), expected, rtol=RTOL)


def test_koleo_of_equal_rows_is_finite():
  """Distance sqrt(7) * 1e-8, plus 1e-8: -log is 17.1."""
  x = np.repeat(normal(1, 7), 4, axis=0)
  value, grad = jax.value_and_grad(losses_dino.koleo)(jnp.asarray(x))
  np.testing.assert_allclose(value, -np.log(7**0.5 * 1e-8 + 1e-8), rtol=1e-3)
  assert np.isfinite(grad).all()


def test_gram():
  x, y = normal(2, 3, 4), normal(2, 3, 6, seed=1)
  cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
  expected = np.mean(
    [(cosine(x[b, i], x[b, j]) - cosine(y[b, i], y[b, j])) ** 2 for b, i, j in np.ndindex(2, 3, 3)]
  )
  np.testing.assert_allclose(losses_dino.gram(x, y), expected, rtol=RTOL)
  np.testing.assert_allclose(losses_dino.gram(x, 3 * x), 0, atol=1e-12)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: losses_dino.dino(normal(2, 1, 3), normal(2, 1, 3)), "found 1 of the teacher and 1"),
    (lambda: losses_dino.dino(normal(2, 2, 3), normal(2, 1, 3)), "found 2 of the teacher and 1"),
    (lambda: losses_dino.koleo(normal(6, 3), group=4), "groups of 4 of 6 rows"),
    (lambda: losses_dino.koleo(normal(1, 3)), "a group needs 2 rows"),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()


# --- devices --------------------------------------------------------------------------------


def batch_coupled(x: jax.Array) -> jax.Array:
  """All the losses that mix samples, of rows [16 3 6]: two teacher crops, three of the student."""
  valid = jnp.arange(3) < jnp.arange(16)[:, None] % 3 + 1
  spread = losses_dino.sinkhorn(x[:, ::-1], temperature=0.5, valid=valid)
  center = losses_dino.moved_center(jnp.zeros(6), x, valid=valid)
  centered = losses_dino.softmax_centered(x[:, :2], center, temperature=0.5)
  return (
    losses_dino.koleo(x[:, 0])
    + losses_dino.dino(centered, x)
    + losses_dino.ibot(spread[:, None], x[:, None], valid[:, None], crops=32)
  )


def test_eight_devices_equal_one_in_value_and_gradient():
  x = normal(16, 3, 6)
  value, grad = jax.jit(jax.value_and_grad(batch_coupled))(x)
  mesh = sharding.make_mesh(devices=jax.devices()[:8])
  rows = sharding.batch_sharding(mesh)
  placed = jax.device_put(x, rows)
  assert len({shard.device for shard in placed.addressable_shards}) == 8
  many, many_grad = jax.jit(jax.value_and_grad(batch_coupled), in_shardings=rows)(placed)
  np.testing.assert_allclose(many, value, rtol=1e-6)  # sums in another order
  np.testing.assert_allclose(many_grad, grad, rtol=1e-4, atol=1e-6)


# --- the head -------------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["weight_norm", "unit", "linear"])
def test_head(last):
  head = DinoHead(prototypes=7, hidden=6, bottleneck=4, last=last)
  x = normal(3, 2, 5)
  params = head.init(jax.random.key(0), x)["params"]
  params = jax.tree.map(lambda p: p + 0.3 * normal(*p.shape, seed=p.size), params)
  y = x.astype(np.float64)
  for name in ("dense0", "dense1", "narrow"):
    y = y @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])
    if name != "narrow":
      y = y * 0.5 * (1 + np.vectorize(math.erf)(y / 2**0.5))
  y /= np.linalg.norm(y, axis=-1, keepdims=True)
  kernel = np.asarray(params["prototypes"]["kernel"], np.float64)
  if last != "linear":
    kernel = kernel / np.linalg.norm(kernel, axis=0)
  if last == "weight_norm":
    kernel = kernel * np.asarray(params["prototypes"]["gain"])
  assert ("gain" in params["prototypes"]) == (last == "weight_norm")
  np.testing.assert_allclose(head.apply({"params": params}, x), y @ kernel, rtol=1e-4, atol=1e-5)


def test_head_has_the_published_number_of_parameters():
  """L of the short recipe, g of the long one."""
  for width, head, expected in (
    (1024, DinoHead(), 23_662_848),
    (1536, DinoHead(prototypes=131_072, bottleneck=384), 58_593_664),
  ):
    shapes = jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, width)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected
