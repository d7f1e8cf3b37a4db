"""VICReg: two views agree, features keep their variance and lose their covariance.

Source: arXiv 2105.04906 and facebookresearch/vicreg (the variant `paper_code`: invariance as the
mean over features, unbiased variance, half weight on each branch's hinge).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jepax import losses, values
from jepax.config import Run
from jepax.core import Batch, Carry, LossOut, Params
from jepax.methods.two_views import TwoViews, build_encoder, build_head, build_views


@dataclasses.dataclass(frozen=True, kw_only=True)
class VICReg(TwoViews):
  """VICReg; variance and covariance are those of the global batch. The projector is the expander.

  invariance, variance, covariance: weights of the three terms.
  """

  invariance: float = 25.0
  variance: float = 25.0
  covariance: float = 1.0

  def loss(
    self, params: Params, carry: Carry, batch: Batch, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, LossOut]:
    """One batch: two views, encode and expand each, three terms."""
    (x, y), carry = self.project(params, carry, self.draw_views(key, batch))  # [b e]
    invariance = losses.squared(x, y).mean()
    variance = (losses.variance_hinge(x) + losses.variance_hinge(y)) / 2
    covariance = losses.covariance_penalty(x) + losses.covariance_penalty(y)
    loss = self.invariance * invariance + self.variance * variance + self.covariance * covariance
    metrics = {
      "loss/invariance": invariance,
      "loss/variance": variance,
      "loss/covariance": covariance,
      "train/embedding_std": jnp.std(x, axis=0).mean(),
    }
    return loss, LossOut(carry, metrics)


def build(
  run: Run,
  *,
  encoder: Mapping[str, Any],
  views: Mapping[str, Any],
  second: Mapping[str, Any] | None = None,
  expander: tuple[int, ...] = (8192, 8192, 8192),
  invariance: float = 25.0,
  variance: float = 25.0,
  covariance: float = 1.0,
) -> VICReg:
  """VICReg for a run.

  Args:
    run: normalisation and compute dtype.
    encoder: arguments of `models.vit.vit`, `resnet` or `convnext`.
    views: fields of `data.augment.Augment` but mean and std.
    second: what differs in the second view.
    expander: hidden and output widths.
    invariance: weight of the agreement between views.
    variance: weight of the hinge on each feature's standard deviation.
    covariance: weight of the off-diagonal covariance.

  Raises:
    ValueError: an unknown key, or a value that can't work.
  """
  values.not_negative(invariance=invariance, variance=variance, covariance=covariance)
  return VICReg(
    encoder=build_encoder(run, encoder),
    projector=build_head(run, expander, where="method.expander"),
    views=build_views(run, views, second),
    invariance=invariance,
    variance=variance,
    covariance=covariance,
  )
