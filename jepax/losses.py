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
  return jnp.mean(_set_means(x, valid))


def token_means(x: jax.Array, valid: jax.Array) -> jax.Array:
  """What `token_mean` is the mean of: x f32[b ... t d], valid bool[b ... t] -> f32[b]."""
  means = _set_means(x, valid)
  return means.reshape(len(means), -1).mean(1)


def _set_means(x: jax.Array, valid: jax.Array) -> jax.Array:
  chex.assert_equal_shape_prefix([x, valid], valid.ndim)
  per_token = x.mean(-1) * valid
  return per_token.sum(-1) / jnp.maximum(valid.sum(-1), 1)


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


# What is done to a target encoder's tokens before they are predicted.
TARGET_NORMS = {"layer_norm": layer_norm, "instance_norm": instance_norm, "none": jnp.float32}


def normalise(x: jax.Array, *, epsilon: float = 1e-12) -> jax.Array:
  """x / max(|x|, epsilon) over the last axis, in float32; the gradient at 0 is finite."""
  x = x.astype(jnp.float32)
  square = jnp.square(x).sum(-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, epsilon**2))


def _standardise(x: jax.Array, axis: int, epsilon: float) -> jax.Array:
  x = x.astype(jnp.float32)
  centred = x - x.mean(axis, keepdims=True)
  return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis, keepdims=True) + epsilon)


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
  """Cosine of the angle between rows: [b d], [b d] -> f32[b]."""
  chex.assert_equal_shape([x, y])
  return (normalise(x) * normalise(y)).sum(-1)


def info_nce(x: jax.Array, y: jax.Array, *, temperature: float) -> jax.Array:
  """In-batch InfoNCE, one direction: row i of x has to find row i among all rows of y.

  mean_i of -log softmax_j(cos(x_i, y_j) / temperature)_i

  Args:
    x: [b d], the global batch.
    y: [b d], candidates; the others of the batch are the negatives.
    temperature: above 0.

  Returns:
    f32[].
  """
  chex.assert_equal_shape([x, y])
  x, y = normalise(x), normalise(y)
  logits = matmul(x, y.T) / temperature
  return jnp.mean(jax.nn.logsumexp(logits, axis=1) - (x * y).sum(-1) / temperature)


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  """x @ y in float32 on every device: accelerators would round the factors to 8 or 11 bits."""
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def off_diagonal(x: jax.Array, y: jax.Array) -> jax.Array:
  """Sum of the squared off-diagonal elements of x^T y.

  The Gram matrices of the smaller side are used: |X^T Y|_F^2 is the sum of (X X^T) * (Y Y^T), so
  d = 8192 and b = 2048 need 2048 x 2048 matrices and no more.

  Args:
    x, y: f32[b d].

  Returns:
    f32[].
  """
  chex.assert_equal_shape([x, y])
  b, d = x.shape
  total = matmul(x, x.T) * matmul(y, y.T) if b < d else jnp.square(matmul(x.T, y))
  return total.sum() - jnp.square((x * y).sum(0)).sum()


def check_temperature(temperature: float) -> None:
  """Raises ValueError unless it is above 0."""
  if not temperature > 0:
    raise ValueError(f"temperature must be above 0, found {temperature}")


def variance_hinge(
  x: jax.Array, *, valid: jax.Array | None = None, epsilon: float = 1e-4
) -> jax.Array:
  """VICReg's variance term of one branch: mean over features of relu(1 - std).

  Args:
    x: [b d], the global batch, b at least 2.
    valid: bool[b], rows that count; None for all.
    epsilon: added to the (unbiased) variance.

  Returns:
    f32[], in [0, 1].

  Source: arXiv 2105.04906 and facebookresearch/vicreg.
  """
  x, count = _centre(x, valid)
  std = jnp.sqrt(jnp.square(x).sum(0) / (count - 1) + epsilon)
  return jnp.mean(jax.nn.relu(1 - std))


def covariance_penalty(x: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
  """VICReg's covariance term of one branch: sum of squared off-diagonal covariances over d.

  Args:
    x: [b d], the global batch, b at least 2.
    valid: bool[b], rows that count; None for all.

  Returns:
    f32[], not negative.

  Source: arXiv 2105.04906 and facebookresearch/vicreg, which sum the d x d matrix.
  """
  x, count = _centre(x, valid)
  return off_diagonal(x, x) / (count - 1) ** 2 / x.shape[1]


def _centre(x: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array | int]:
  """Rows less the mean of the valid ones, the others zero, and how many are valid."""
  chex.assert_rank(x, 2)
  if x.shape[0] < 2:
    raise ValueError(f"a variance over the batch needs 2 samples or more, found {x.shape[0]}")
  x = x.astype(jnp.float32)
  if valid is None:
    return x - x.mean(0), x.shape[0]
  chex.assert_equal_shape_prefix([x, valid], 1)
  weight, count = valid[:, None], valid.sum()
  mean = jnp.where(weight, x, 0).sum(0) / jnp.maximum(count, 1)
  return jnp.where(weight, x - mean, 0), jnp.maximum(count, 2)
