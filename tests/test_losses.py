"""Losses against slow loops in float64."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jepax import losses
from jepax.methods.mae import patch_targets
from jepax.methods.vicreg import VICReg

RTOL = 1e-5  # float32 sums of at most a few hundred terms of order 1


def normal(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- elementwise ----------------------------------------------------------------------------


def test_smooth_l1():
  x, y = 2 * normal(4, 5), normal(4, 5, seed=1)
  for found, a, b in zip(losses.smooth_l1(x, y).ravel(), x.ravel(), y.ravel(), strict=True):
    e = float(a) - float(b)
    np.testing.assert_allclose(found, e * e / 2 if abs(e) < 1 else abs(e) - 0.5, rtol=RTOL)
  errors = jnp.asarray([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
  slope = jax.vmap(jax.grad(lambda e: losses.smooth_l1(e, jnp.zeros(()))))(errors)
  np.testing.assert_array_equal(slope, jnp.clip(errors, -1, 1))


def test_squared():
  np.testing.assert_allclose(losses.squared(jnp.asarray([1.0, -2.0]), jnp.ones(2)), [0.0, 9.0])


@pytest.mark.parametrize("loss", [losses.smooth_l1, losses.squared])
def test_elementwise_losses_work_in_float32_and_never_broadcast(loss):
  x, y = jnp.asarray([256.0], jnp.bfloat16), jnp.asarray([1.0], jnp.bfloat16)
  assert loss(x, y).dtype == jnp.float32
  assert loss(x, y)[0] in (254.5, 255.0**2)  # bfloat16 has no 255.0**2 and no 254.5
  with pytest.raises(AssertionError):
    loss(jnp.ones((3, 1)), jnp.ones((3, 4)))


def test_layer_norm():
  x = 3 * normal(2, 3, 7) + 5
  for found, row in zip(
    losses.layer_norm(x).reshape(-1, 7), x.astype(np.float64).reshape(-1, 7), strict=True
  ):
    expected = (row - row.mean()) / math.sqrt(row.var() + 1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # a mean of 5 is taken off
  # At this scale epsilon is half of all: the test that tells 1e-5 from 1e-6.
  small = jnp.asarray([1e-5**0.5, -(1e-5**0.5)])
  np.testing.assert_allclose(losses.layer_norm(small), [0.5**0.5, -(0.5**0.5)], rtol=RTOL)


# --- means over sets ------------------------------------------------------------------------


def test_token_mean_weighs_every_set_alike():
  x = normal(3, 2, 4, 5)  # [b m t d]
  sizes = [[4, 1], [2, 3], [1, 1]]
  valid = np.arange(4) < np.asarray(sizes)[..., None]
  expected = np.mean(
    [[x[i, j, : sizes[i][j]].astype(np.float64).mean() for j in range(2)] for i in range(3)]
  )
  np.testing.assert_allclose(losses.token_mean(x, valid), expected, rtol=RTOL)


def test_token_means_are_those_of_each_sample():
  x = normal(3, 2, 4, 5)
  valid = np.arange(4) < np.asarray([[4, 1], [2, 3], [1, 1]])[..., None]
  alone = [losses.token_mean(x[i : i + 1], valid[i : i + 1]) for i in range(3)]
  np.testing.assert_allclose(losses.token_means(x, valid), alone, rtol=RTOL)


def test_token_mean_of_full_sets_is_the_mean():
  x = normal(3, 4, 5)
  found = losses.token_mean(x, np.ones((3, 4), bool))
  np.testing.assert_allclose(found, x.mean(dtype=np.float64), rtol=1e-4)  # near zero


def test_token_mean_never_sees_padding():
  x, valid = normal(2, 3, 4), np.asarray([[True, True, False], [True, False, False]])
  wild = np.where(valid[..., None], x, 1e6)
  assert losses.token_mean(wild, valid) == losses.token_mean(x, valid)
  grad = jax.grad(losses.token_mean)(jnp.asarray(x), jnp.asarray(valid))
  assert not np.any(grad[~valid]) and np.all(np.asarray(grad)[valid] != 0)


def test_token_mean_of_an_empty_set_is_zero():
  assert losses.token_mean(jnp.ones((1, 2, 3)), jnp.zeros((1, 2), bool)) == 0


# --- VICReg ---------------------------------------------------------------------------------


@pytest.mark.parametrize("b, d", [(4, 9), (9, 4), (5, 5), (2, 1)])
def test_vicreg_terms(b, d):
  x = normal(b, d).astype(np.float64) + 3
  mean = [sum(x[:, i]) / b for i in range(d)]
  covariance = [
    [sum((x[n, i] - mean[i]) * (x[n, j] - mean[j]) for n in range(b)) / (b - 1) for j in range(d)]
    for i in range(d)
  ]
  penalty = sum(covariance[i][j] ** 2 for i in range(d) for j in range(d) if i != j) / d
  hinge = sum(max(0.0, 1 - math.sqrt(covariance[i][i] + 1e-4)) for i in range(d)) / d
  x = jnp.asarray(x, jnp.float32)
  # The penalty is a difference of sums; where it is zero, of their rounding.
  np.testing.assert_allclose(losses.covariance_penalty(x), penalty, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(losses.variance_hinge(x), hinge, rtol=1e-4, atol=1e-6)


def test_the_small_gram_matrix_has_the_gradient_of_the_large():
  def explicit(x):
    centred = x - x.mean(0)
    covariance = centred.T @ centred / (x.shape[0] - 1)  # [d d], where b < d takes [b b]
    return jnp.square(covariance * (1 - jnp.eye(x.shape[1]))).sum() / x.shape[1]

  x = jnp.asarray(normal(6, 8))
  both = jax.jit(lambda x: (jax.grad(losses.covariance_penalty)(x), jax.grad(explicit)(x)))
  found, expected = both(x)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("term", [losses.variance_hinge, losses.covariance_penalty])
def test_gradients_are_finite_without_variance(term):
  value, grad = jax.value_and_grad(term)(jnp.full((4, 6), 2.0))
  assert np.isfinite(value) and np.all(np.isfinite(grad))


@pytest.mark.parametrize("term", [losses.variance_hinge, losses.covariance_penalty])
def test_a_batch_of_one_has_no_variance(term):
  with pytest.raises(ValueError, match="2 samples or more, found 1"):
    term(jnp.ones((1, 6)))


class Pixels(nn.Module):
  """The image as its only token, as encoder; a plain copy, as expander."""

  flat: bool = False
  class_token: bool = False

  def __call__(self, x):
    return x if self.flat else x.reshape(x.shape[0], 1, -1)


class Views:
  crops = (None, None)

  def __init__(self, noise: float):
    self.noise = noise

  def __call__(self, keys, images):
    return images + self.noise * jax.random.normal(keys[0, 0], (2, *images.shape))


def vicreg_loss(images: np.ndarray, *, noise: float = 0.0):
  method = VICReg(encoder=Pixels(), projector=Pixels(flat=True), views=Views(noise))
  batch = {"image": jnp.asarray(images, jnp.float32)}
  params = {"encoder": {}, "projector": {}}
  loss, out = jax.jit(method.loss)(params, {}, batch, jax.random.key(0), 0)
  return float(loss), {name: float(value) for name, value in out.metrics.items()}


def test_constant_equal_views_cost_24_75():
  """Variance 0 in both branches: 25 * (1 - sqrt(1e-4)), half a branch, and nothing else."""
  loss, metrics = vicreg_loss(np.full((4, 2, 2, 1), 3.0))
  np.testing.assert_allclose(loss, 24.75, rtol=1e-6)
  assert metrics["loss/invariance"] == 0 and metrics["loss/covariance"] == 0
  np.testing.assert_allclose(metrics["loss/variance"], 0.99, rtol=1e-6)


def test_whitened_equal_views_cost_nothing():
  rows, _ = np.linalg.qr(np.concatenate([np.ones((8, 1)), normal(8, 4)], 1))
  white = rows[:, 1:] * np.sqrt(7)  # mean 0, unbiased variance 1, covariance 0
  loss, _ = vicreg_loss(white.reshape(8, 2, 2, 1))
  assert abs(loss) < 1e-5


def test_vicreg_is_the_weighted_sum_of_its_terms():
  loss, terms = vicreg_loss(normal(6, 2, 2, 1), noise=0.3)
  assert all(terms[f"loss/{name}"] > 0 for name in ("invariance", "variance", "covariance"))
  expected = 25 * terms["loss/invariance"] + 25 * terms["loss/variance"] + terms["loss/covariance"]
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


# --- MAE ------------------------------------------------------------------------------------


def test_normalised_patches_have_unbiased_variance():
  patches = normal(2, 3, 12) * 4 + 1
  for found, p in zip(
    patch_targets(jnp.asarray(patches), normalize=True).reshape(-1, 12),
    patches.astype(np.float64).reshape(-1, 12),
    strict=True,
  ):
    variance = sum((v - p.mean()) ** 2 for v in p) / 11
    np.testing.assert_allclose(found, (p - p.mean()) / math.sqrt(variance + 1e-6), atol=1e-5)
  np.testing.assert_array_equal(patch_targets(patches, normalize=False), patches)


def test_a_constant_patch_is_a_target_of_zero():
  flat = jnp.full((1, 2, 12), 0.7)
  np.testing.assert_allclose(patch_targets(flat, normalize=True), 0, atol=1e-3)  # 1e-7 / 1e-3
  grad = jax.grad(lambda x: jnp.square(patch_targets(x, normalize=True)).sum())(flat)
  assert np.all(np.isfinite(grad))
