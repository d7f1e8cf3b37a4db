"""Collapse monitors: numbers that show it, and an alarm that says what collapsed and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jepax.evals import checks

NUMBERS = ("feature_std", "rankme", "rankme_centred", "cosine")


@dataclasses.dataclass(frozen=True)
class Thresholds:
  """Where the alarm goes off.

  A fresh ViT maps all images to nearly one direction, since patch content is small beside the
  position table: on Fashion-MNIST its pooled outputs have std 0.015 to 0.05, cosine 0.994 to
  0.9994 and RankMe 1.2 to 1.8 (2.0 to 8.9 centred). It has not collapsed, so the bounds lie
  beyond it, and plain RankMe, which reads the common direction more than the spread, has none.

  cosine: complete collapse above it; the spread is then under 1 % of the features' size.
  feature_std: complete collapse under it, if the cosine is also above `aligned`: a spread that
    is small but points every way is a small scale, not collapse.
  ema_distance: the target has lost its encoder above it; two random ones are at 1.4.
  rankme_centred: dimensional collapse under it, in dimensions.
  control_share: dimensional collapse under this share of the control's centred RankMe.
  """

  cosine: float = 0.9999
  feature_std: float = 0.01
  aligned: float = 0.95
  rankme_centred: float = 1.5
  control_share: float = 0.5
  ema_distance: float = 1.0


@jax.jit
def ema_distance(target: Any, online: Any) -> jax.Array:
  """|online - target| / |online| over all weights, f32[]: how far a target trails its encoder."""
  difference = jax.tree.map(jnp.subtract, online, target)
  return optax.tree.norm(difference) / optax.tree.norm(online)


def numbers(features: jax.Array | np.ndarray) -> dict[str, float]:
  """How far features spread, on four scales.

  Args:
    features: f32[n d], one pooled vector a sample, n at least 2; all of them are compared.

  Returns:
    feature_std: standard deviation over samples, mean over dimensions; 0 is complete collapse.
    rankme: exp of the entropy of the singular values, not centred, as published; 1 to d.
    rankme_centred: the same after the mean over samples is removed: the number of directions
      in which samples differ, whatever they have in common.
    cosine: mean cosine over all pairs of different samples; 1 is complete collapse.

  Raises:
    ValueError: fewer than 2 samples or not two axes.

  Source:
    RankMe: Garrido et al. 2023, arXiv 2210.02885, eq. 1.
  """
  features = checks.features(features, name="features")
  if features.shape[0] < 2:
    raise ValueError(f"collapse is seen across samples: give at least 2, found {len(features)}")
  z = np.asarray(features, np.float64)
  centred = z - z.mean(0)
  return {
    "feature_std": float(np.sqrt(np.square(centred).mean(0)).mean()),
    "rankme": _rankme(z),
    "rankme_centred": _rankme(centred),
    "cosine": float(_mean_cosine(features)),
  }


def alarm(
  branch: str,
  numbers: Mapping[str, float],
  *,
  dim: int,
  count: int | None = None,
  thresholds: Thresholds | None = None,
  control: Mapping[str, float] | None = None,
) -> str | None:
  """Names what collapsed, by which number, and what to try; None when nothing did.

  Args:
    branch: the encoder the features came from, 'target' or 'online'.
    numbers: from `numbers`; of a target also `ema_distance`, where it is known.
    dim: d of the features.
    count: n of the features, whose differences have n - 1 directions at most; None for many.
    thresholds: other bounds than the defaults.
    control: `numbers` of the same encoder at random initialisation on the same images; then
      the rank that these images give without training is taken into account.
  """
  limits = Thresholds() if thresholds is None else thresholds
  std, cosine, rank = (numbers[name] for name in ("feature_std", "cosine", "rankme_centred"))
  if not np.isfinite([std, cosine, rank]).all():
    return (
      f"{branch} encoder: its features are not finite, so training has diverged. Try a lower "
      "learning rate, a longer warm-up, gradient clipping, or float32."
    )
  if control is not None and all(numbers[name] == control[name] for name in NUMBERS):
    return (
      f"{branch} encoder: after training it gives to the bit what it gave at random "
      "initialisation, so it has not moved. Check that its momentum is below 1 and that the "
      "learning rate is not 0."
    )
  small = std < limits.feature_std and cosine > limits.aligned
  if small or cosine > limits.cosine:
    found = f"mean feature std {std:.2g}, mean pairwise cosine {cosine:.6f}"
    bounds = (
      f"alarm under std {limits.feature_std:g} with cosine over {limits.aligned:g}, or over "
      f"cosine {limits.cosine:g}"
    )
    return (
      f"{branch} encoder: complete collapse, every image gets nearly the same features ({found}; "
      f"{bounds}). Check that no gradient reaches the target and that its momentum is near but "
      "below 1; try a lower learning rate, a longer warm-up, or larger target blocks."
    )
  floor = limits.rankme_centred
  beside = ""
  if control is not None:
    floor = max(floor, limits.control_share * control["rankme_centred"])
    beside = f", random initialisation has {control['rankme_centred']:.1f}"
  if count is not None:
    floor = min(floor, limits.control_share * (count - 1))
  if rank < floor:
    return (
      f"{branch} encoder: dimensional collapse, images differ in about {rank:.1f} of {dim} "
      f"dimensions (centred RankMe {rank:.2f}{beside}; alarm under {floor:.2f}). Try a "
      "lower learning rate or less weight decay, and where the method has them a regulariser on "
      "variance and covariance, or a weaker predictor."
    )
  return _distance_alarm(branch, numbers.get("ema_distance"), limits.ema_distance)


def _distance_alarm(branch: str, distance: float | None, limit: float) -> str | None:
  """Of a target that is no average, or has lost its encoder."""
  if distance == 0:
    return (
      f"{branch} encoder: it equals the online one, so nothing is averaged. Check that its "
      "momentum is above 0 and that the learning rate is not 0."
    )
  if distance is not None and distance > limit:
    return (
      f"{branch} encoder: its weights differ from the online ones by {distance:.2g} of their norm "
      f"(alarm over {limit:g}), so it no longer follows them. Try a lower momentum, "
      "a lower learning rate, or more weight decay."
    )
  return None


def _rankme(z: np.ndarray) -> float:
  # Squared singular values as eigenvalues of the smaller Gram matrix, much faster than an SVD; in
  # float64, since float32 would lose the singular values below 1e-3 of the largest.
  if not np.isfinite(z).all():
    return float("nan")
  x = z if z.shape[0] >= z.shape[1] else z.T
  squares = np.linalg.eigvalsh(x.T @ x)
  # What the features' own float32 rounding leaves of a zero singular value is no rank.
  noise = np.square(4 * np.finfo(np.float32).eps) * squares[-1]
  singular = np.sqrt(np.where(squares > noise, squares, 0.0))
  p = singular / max(singular.sum(), np.finfo(np.float64).tiny) + 1e-7
  return float(np.exp(-(p * np.log(p)).sum()))


@jax.jit
def _mean_cosine(z):
  """Mean over pairs i != j of u_i.u_j, from |sum u|^2 = n + the sum over those pairs."""
  norm = jnp.linalg.norm(z, axis=1, keepdims=True)
  # Vectors of zeros point nowhere; the last column makes them one direction of their own.
  u = jnp.concatenate([z / jnp.where(norm > 0, norm, 1.0), norm == 0], axis=1)
  n = u.shape[0]
  mean = u.mean(0)
  return (n * jnp.square(mean).sum() - 1) / (n - 1)
