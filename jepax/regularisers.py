"""Remedies against collapse beside a method's own loss: of what is encoded, or predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jepax import losses
from jepax.construct import construct
from jepax.core import Metrics
from jepax.names import one_of
from jepax.sigreg import draw_directions, sigreg


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regulariser:
  """A penalty on features of the global batch; see `penalty` of the classes below.

  weight: of the penalty in the loss.
  on: 'pooled', the mean of each sample's tokens, or 'tokens', all of them as samples.
  """

  weight: float
  on: str = "pooled"

  def __post_init__(self):
    one_of(self.on, ("pooled", "tokens"), where="on")
    _check_weight(self.weight)

  def __call__(
    self, tokens: jax.Array, valid: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, Metrics]:
    """The weighted penalty and its parts.

    Args:
      tokens: [b k d], of the encoder being trained.
      valid: bool[b k], tokens that count; at least one a sample.
      key: for directions drawn at random.
    """
    chex.assert_equal_shape_prefix([tokens, valid], 2)
    if self.on == "pooled":
      total = (tokens * valid[..., None]).sum(1)
      penalty, metrics = self.penalty(total / valid.sum(1)[:, None], None, key)
    else:
      rows = tokens.reshape(-1, tokens.shape[-1])
      penalty, metrics = self.penalty(rows, valid.reshape(-1), key)
    return self.weight * penalty, metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class VarianceCovariance(Regulariser):
  """VICReg's two terms without its invariance, as in C-JEPA (arXiv 2410.19560).

  variance, covariance: weights of the two terms.
  """

  variance: float = 25.0
  covariance: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    if min(self.variance, self.covariance) < 0:
      raise ValueError(
        f"variance={self.variance} and covariance={self.covariance} must not be negative"
      )

  def penalty(
    self, x: jax.Array, valid: jax.Array | None, key: jax.Array
  ) -> tuple[jax.Array, Metrics]:
    """x: [n d], valid: bool[n] or None -> f32[] and metrics."""
    del key
    variance = losses.variance_hinge(x, valid=valid)
    covariance = losses.covariance_penalty(x, valid=valid)
    metrics = {"loss/variance": variance, "loss/covariance": covariance}
    return self.variance * variance + self.covariance * covariance, metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian(Regulariser):
  """SIGReg, LeJEPA's term (arXiv 2511.08544).

  slices: random directions a step. t_max, nodes: see `sigreg.epps_pulley`.
  """

  slices: int = 1024
  t_max: float = 3.0
  nodes: int = 17

  def __post_init__(self):
    super().__post_init__()
    if self.slices < 1:
      raise ValueError(f"slices must be at least 1, found {self.slices}")

  def penalty(
    self, x: jax.Array, valid: jax.Array | None, key: jax.Array
  ) -> tuple[jax.Array, Metrics]:
    """x: [n d], valid: bool[n] or None -> f32[] and metrics."""
    directions = draw_directions(key, width=x.shape[-1], count=self.slices)
    statistic = sigreg(x, directions, t_max=self.t_max, nodes=self.nodes, valid=valid)
    return statistic, {"loss/sigreg": statistic}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast:
  """InfoNCE between predictions and their targets: the batch's other samples are the negatives.

  Each sample's pooled prediction has to find its own pooled target among those of the global batch;
  log b is what one that tells no sample from another gets.

  weight: of the term in the loss. temperature: of the softmax, above 0.
  """

  weight: float
  temperature: float = 0.1

  def __post_init__(self):
    losses.check_temperature(self.temperature)
    _check_weight(self.weight)

  def __call__(
    self, prediction: jax.Array, target: jax.Array, valid: jax.Array
  ) -> tuple[jax.Array, Metrics]:
    """The weighted term, and itself as a metric.

    Args:
      prediction, target: [b m t d], the tokens predicted and what they should be.
      valid: bool[b m t], tokens that count; at least one a sample.

    Raises:
      ValueError: one sample, which has no negatives.
    """
    chex.assert_equal_shape([prediction, target])
    chex.assert_equal_shape_prefix([prediction, valid], 3)
    if len(prediction) < 2:
      raise ValueError("contrast takes its negatives from the batch: batch_size must be 2 or more")
    of_valid = valid[..., None]
    pooled = (x.astype(jnp.float32).mean((1, 2), where=of_valid) for x in (prediction, target))
    loss = losses.info_nce(*pooled, temperature=self.temperature)
    return self.weight * loss, {"loss/contrast": loss}


def _check_weight(weight: float) -> None:
  if not weight > 0:
    raise ValueError(f"weight must be above 0, found {weight}; remove it for none")


REGULARISERS = {"vicreg": VarianceCovariance, "sigreg": Gaussian}


def build(section: Mapping[str, Any], *, where: str) -> Regulariser:
  """The regulariser of a config section: `name`, a key of REGULARISERS, and its fields.

  Raises:
    ValueError: an unknown name or key, or a value that can't work.
  """
  arguments = dict(section)
  name = one_of(str(arguments.pop("name", "")), REGULARISERS, where=f"{where}.name")
  return construct(REGULARISERS[name], arguments, where=where)
