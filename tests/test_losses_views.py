"""Losses of the methods with two views, and SIGReg, against slow loops in float64."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jepax import losses, sharding
from jepax.methods.barlow_twins import redundancy
from jepax.methods.lejepa import CONVENTIONS, invariance
from jepax.methods.simclr import nt_xent
from jepax.models.heads import BatchNorm
from jepax.sigreg import draw_directions, epps_pulley, sigreg

RTOL = 1e-5  # float32 sums of at most a few hundred terms of order 1


def normal(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(row) -> list[float]:
  length = math.sqrt(sum(float(v) ** 2 for v in row))
  return [float(v) / length for v in row]


def dot(a, b) -> float:
  return sum(x * y for x, y in zip(a, b, strict=True))


X, Y = normal(6, 4), normal(6, 4, seed=1)
WIDE_X, WIDE_Y = normal(4, 7), normal(4, 7, seed=1)


# --- contrast and cosine --------------------------------------------------------------------


def slow_info_nce(x, y, temperature):
  x, y = [unit(r) for r in x], [unit(r) for r in y]
  total = 0.0
  for i, row in enumerate(x):
    logits = [dot(row, other) / temperature for other in y]
    total += math.log(sum(math.exp(v) for v in logits)) - logits[i]
  return total / len(x)


def slow_nt_xent(x, y, temperature):
  z = [unit(r) for r in [*x, *y]]
  total, b = 0.0, len(x)
  for i, row in enumerate(z):
    logits = {j: dot(row, z[j]) / temperature for j in range(2 * b) if j != i}
    total += math.log(sum(math.exp(v) for v in logits.values())) - logits[(i + b) % (2 * b)]
  return total / (2 * b)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_contrastive_losses(temperature):
  found = losses.info_nce(X, Y, temperature=temperature)
  np.testing.assert_allclose(found, slow_info_nce(X, Y, temperature), rtol=RTOL)
  found = nt_xent(X, Y, temperature=temperature)
  np.testing.assert_allclose(found, slow_nt_xent(X, Y, temperature), rtol=RTOL)


def test_a_temperature_of_zero_is_refused():
  with pytest.raises(ValueError, match="temperature must be above 0, found 0"):
    losses.check_temperature(0.0)


def test_cosine():
  expected = [dot(unit(a), unit(b)) for a, b in zip(X, Y, strict=True)]
  np.testing.assert_allclose(losses.cosine(X, Y), expected, rtol=RTOL, atol=1e-6)
  zero = jnp.zeros((2, 3))
  value, grad = jax.value_and_grad(lambda x: losses.cosine(x, jnp.ones((2, 3))).sum())(zero)
  assert value == 0 and np.all(np.isfinite(grad))


# --- Barlow Twins ---------------------------------------------------------------------------


@pytest.mark.parametrize("x, y", [(X, Y), (WIDE_X, WIDE_Y)], ids=["tall", "wide"])
def test_redundancy(x, y):
  x, y = x.astype(np.float64), y.astype(np.float64)
  b, d = x.shape
  standard = lambda z: (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)  # noqa: E731
  a, c = standard(x), standard(y)
  on = off = 0.0
  for i in range(d):
    for j in range(d):
      correlation = sum(a[n, i] * c[n, j] for n in range(b)) / b
      on += (correlation - 1) ** 2 if i == j else 0
      off += correlation**2 if i != j else 0
  normed = (BatchNorm(affine=False).apply({}, jnp.asarray(z, jnp.float32)) for z in (x, y))
  np.testing.assert_allclose(redundancy(*normed), (on, off), rtol=1e-4)  # a difference of sums


# --- SIGReg ---------------------------------------------------------------------------------


def trapezoid(values, t) -> float:
  return sum((a + b) / 2 for a, b in itertools.pairwise(values)) * float(t[1] - t[0])


def slow_statistic(x, *, t_max=3.0, nodes=17, times_samples=True):
  """Over the whole line from -t_max to t_max, by the trapezoid rule: no use of evenness."""
  out = []
  for column in np.asarray(x, np.float64).T:
    t = np.linspace(-t_max, t_max, 2 * nodes - 1)
    values = []
    for node in t:
      gaussian = math.exp(-(node**2) / 2)
      c = sum(math.cos(node * v) for v in column) / len(column)
      s = sum(math.sin(node * v) for v in column) / len(column)
      values.append(((c - gaussian) ** 2 + s**2) * gaussian)
    out.append(trapezoid(values, t) * (len(column) if times_samples else 1))
  return np.array(out)


@pytest.mark.parametrize(
  "settings", [{}, {"t_max": 5.0, "nodes": 9}, {"times_samples": False}, {"t_max": 1.0, "nodes": 5}]
)
def test_the_statistic_of_normality(settings):
  x = 2 * normal(11, 3) + 0.5
  found = epps_pulley(jnp.asarray(x), **settings)
  np.testing.assert_allclose(found, slow_statistic(x, **settings), rtol=RTOL)


def test_calibration():
  """What Gaussian samples cost on average, and a batch that is one point."""
  many = jnp.asarray(normal(200, 512, 8))
  # The sheet's values; 1600 draws of a statistic whose spread is about as large as its mean.
  assert float(epps_pulley(many).mean()) == pytest.approx(1.0525, abs=0.06)
  assert float(epps_pulley(many, t_max=5.0, nodes=9).mean()) == pytest.approx(1.0594, abs=0.06)
  point = jnp.zeros((128, 1))
  assert float(epps_pulley(point)[0]) == pytest.approx(0.40205 * 128, rel=1e-4)
  assert float(epps_pulley(point, t_max=5.0, nodes=9)[0]) == pytest.approx(0.409 * 128, rel=2e-3)
  # Its exact mean: the integral of (1 - e^{-t^2}) e^{-t^2 / 2}, by a fine rule.
  t = np.linspace(-3, 3, 10001)
  exact = trapezoid((1 - np.exp(-(t**2))) * np.exp(-(t**2) / 2), t)
  assert exact == pytest.approx(1.0525, abs=1e-3)


def test_sigreg_reduces_over_directions_and_views():
  z, a = normal(2, 10, 5), draw_directions(jax.random.key(0), width=5, count=7)
  np.testing.assert_allclose(jnp.linalg.norm(a, axis=0), 1.0, rtol=1e-6)
  expected = np.mean([slow_statistic(view @ np.asarray(a)) for view in z])
  np.testing.assert_allclose(sigreg(z, a), expected, rtol=RTOL)
  np.testing.assert_allclose(sigreg(z, a, reduction="sum"), 7 * expected, rtol=RTOL)
  with pytest.raises(ValueError, match="'mean' or 'sum', found 'none'"):
    sigreg(z, a, reduction="none")


def test_rows_that_are_not_valid_never_count():
  x, valid = normal(9, 4), np.arange(9) < 6
  wild = jnp.asarray(np.where(valid[:, None], x, 1e3))
  for term in (losses.variance_hinge, losses.covariance_penalty, epps_pulley):
    expected = term(jnp.asarray(x[:6]))
    np.testing.assert_allclose(term(wild, valid=jnp.asarray(valid)), expected, rtol=1e-4)
    grad = jax.grad(lambda x, term=term: term(x, valid=jnp.asarray(valid)).sum())(wild)
    assert not np.any(grad[6:]) and np.any(grad[:6])


def test_what_the_statistic_refuses():
  with pytest.raises(ValueError, match="nodes must be at least 2"):
    epps_pulley(jnp.ones((4, 2)), nodes=1)
  with pytest.raises(AssertionError):
    epps_pulley(jnp.ones((4, 2), jnp.bfloat16))


@pytest.mark.parametrize("name", sorted(CONVENTIONS))
def test_invariance_of_every_convention(name):
  z = normal(4, 5, 3)  # [v b e]
  how, total = CONVENTIONS[name], 0.0
  if how.centre == "pairs":
    pairs = [(v, w) for v in range(4) for w in range(4) if v != w]
    for v, w in pairs:
      total += sum((z[v, n, i] - z[w, n, i]) ** 2 for n in range(5) for i in range(3))
    expected = total / len(pairs) / 5 / 3
  else:
    centre = z[:2] if how.centre == "globals" else z
    for v in range(4):
      for n in range(5):
        mean = [sum(c[n, i] for c in centre) / len(centre) for i in range(3)]
        total += sum((z[v, n, i] - mean[i]) ** 2 for i in range(3))
    expected = total / 4 / 5 / (1 if how.total else 3)
  found = invariance(jnp.asarray(z), convention=how, global_views=2)
  np.testing.assert_allclose(found, expected, rtol=RTOL)


def test_published_weights_of_the_conventions():
  weights = {name: (how.weight, how.convex, how.flat) for name, how in CONVENTIONS.items()}
  assert weights == {
    "paper_formula": (0.05, True, False),
    "paper": (0.05, True, False),
    "minimal": (0.02, True, False),
    "stable_pretraining": (0.02, False, True),
    "eb_jepa": (10.0, False, False),
  }


# --- the global batch -----------------------------------------------------------------------

A = draw_directions(jax.random.key(0), width=12, count=6)
COUPLED = {
  "variance": lambda x, y: losses.variance_hinge(x) + losses.variance_hinge(y),
  "covariance": lambda x, y: losses.covariance_penalty(x) + losses.covariance_penalty(y),
  "barlow": lambda x, y: sum(redundancy(*(BatchNorm(affine=False).apply({}, z) for z in (x, y)))),
  "nt_xent": functools.partial(nt_xent, temperature=0.1),
  "info_nce": functools.partial(losses.info_nce, temperature=0.2),
  "sigreg": lambda x, y: sigreg(jnp.stack([x, y]), A),
}


@pytest.mark.parametrize("name", sorted(COUPLED))
def test_eight_devices_have_the_value_and_gradient_of_one(name):
  """On the mesh rows lie apart, and what is computed on a part of them alone would differ."""
  x, y = normal(16, 12), normal(16, 12, seed=1) + 0.5 * normal(16, 12)
  function = jax.value_and_grad(COUPLED[name], argnums=(0, 1))
  value, grads = jax.jit(function)(x, y)
  mesh = sharding.make_mesh(devices=jax.devices())
  rows = sharding.batch_sharding(mesh)
  assert rows.spec == PartitionSpec(sharding.ROWS) and mesh.size == 8
  placed = (jax.device_put(z, rows) for z in (x, y))
  with jax.set_mesh(mesh):
    found, found_grads = jax.jit(function, in_shardings=(rows, rows))(*placed)
  np.testing.assert_allclose(found, value, rtol=1e-6)  # sums in another order
  for a, b in zip(found_grads, grads, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
