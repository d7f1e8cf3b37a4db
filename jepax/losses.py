"""Losses that several methods share: pure functions of arrays, in float32."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def smooth_l1(x: jax.Array, y: jax.Array) -> jax.Array:
  """Elementwise e**2 / 2 where |e| < 1, |e| - 1/2 beyond, with e = x - y (beta 1, as torch)."""
  chex.assert_equal_shape([x, y])
  error = jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32))
  return jnp.where(error < 1, 0.5 * error**2, error - 0.5)


def squared(x: jax.Array, y: jax.Array) -> jax.Array:
  """Elementwise (x - y)**2."""
  chex.assert_equal_shape([x, y])
  return jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32))


OBJECTIVES = {"smooth_l1": smooth_l1, "mse": squared}


def token_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
  """Mean over features and valid tokens of each set, then over sets and samples.

  Every target block weighs the same whatever its size, so that micro-batches and devices can
  be averaged; with equal sizes it is the plain mean over all elements.

  Args:
    x: f32[... t d].
    valid: bool[... t].

  Returns:
    f32[].
  """
  chex.assert_equal_shape_prefix([x, valid], valid.ndim)
  per_token = x.mean(-1) * valid
  return jnp.mean(per_token.sum(-1) / jnp.maximum(valid.sum(-1), 1))


def layer_norm(x: jax.Array, *, epsilon: float = 1e-5) -> jax.Array:
  """LayerNorm over the last axis without scale or shift, in float32 (I-JEPA's targets)."""
  return _standardise(x, -1, epsilon)


def instance_norm(x: jax.Array, *, epsilon: float = 1e-5) -> jax.Array:
  """Each channel standardised over the tokens of its sample, in float32 (data2vec's targets).

  Args:
    x: [... n d].
    epsilon: added to the (biased) variance.

  Returns:
    f32[... n d].
  """
  return _standardise(x, -2, epsilon)


def normalise(x: jax.Array, *, epsilon: float = 1e-12) -> jax.Array:
  """x / max(|x|, epsilon) over the last axis, in float32; the gradient at 0 is finite."""
  x = x.astype(jnp.float32)
  square = jnp.square(x).sum(-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, epsilon**2))


def _standardise(x: jax.Array, axis: int, epsilon: float) -> jax.Array:
  x = x.astype(jnp.float32)
  centred = x - x.mean(axis, keepdims=True)
  return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis, keepdims=True) + epsilon)


def variance_hinge(x: jax.Array, *, epsilon: float = 1e-4) -> jax.Array:
  """VICReg's variance term of one branch: mean over features of relu(1 - std).

  Args:
    x: [b d], the global batch, b at least 2.
    epsilon: added to the (unbiased) variance.

  Returns:
    f32[], in [0, 1].

  Source: arXiv 2105.04906 and facebookresearch/vicreg.
  """
  _check_batch(x)
  std = jnp.sqrt(x.astype(jnp.float32).var(0, ddof=1) + epsilon)
  return jnp.mean(jax.nn.relu(1 - std))


def covariance_penalty(x: jax.Array) -> jax.Array:
  """VICReg's covariance term of one branch: sum of squared off-diagonal covariances over d.

  The Gram matrix of the smaller side is used: |X^T X|_F = |X X^T|_F, so d = 8192 and b = 2048
  need a 2048 x 2048 matrix and no more.

  Args:
    x: [b d], the global batch, b at least 2.

  Returns:
    f32[], not negative.

  Source: arXiv 2105.04906 and facebookresearch/vicreg, which sum the d x d matrix.
  """
  _check_batch(x)
  b, d = x.shape
  x = x.astype(jnp.float32)
  x = x - x.mean(0)
  gram = x @ x.T if b < d else x.T @ x
  diagonal = jnp.square(x).sum(0)  # of the d x d matrix
  return (jnp.square(gram).sum() - jnp.square(diagonal).sum()) / (b - 1) ** 2 / d


def _check_batch(x: jax.Array) -> None:
  chex.assert_rank(x, 2)
  if x.shape[0] < 2:
    raise ValueError(f"a variance over the batch needs 2 samples or more, found {x.shape[0]}")
