"""Barlow Twins: the features of two views correlate one to one, and with no other feature.

Source: arXiv 2103.03230 and facebookresearch/barlowtwins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jepax import losses, values
from jepax.config import Run
from jepax.core import Batch, Carry, LossOut, Params
from jepax.methods.two_views import TwoViews, build_encoder, build_head, build_views


def redundancy(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """How far the cross-correlation C of two views is from the identity, on and off its diagonal.

  sum_i (C_ii - 1)^2  and  sum_{i != j} C_ij^2,  C = x^T y / b

  Args:
    x, y: f32[b e], each feature of mean 0 and variance 1 over the global batch.

  Returns:
    f32[], f32[].
  """
  chex.assert_equal_shape([x, y])
  b = x.shape[0]
  diagonal = (x * y).sum(0) / b
  return jnp.square(diagonal - 1).sum(), losses.off_diagonal(x, y) / b**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class BarlowTwins(TwoViews):
  """Barlow Twins; correlations are those of the global batch. The projector standardises.

  off_diagonal: weight of the squared correlations between different features.
  """

  off_diagonal: float = 0.0051

  def loss(
    self, params: Params, carry: Carry, batch: Batch, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, LossOut]:
    """One batch: two views, encode and project each, compare features."""
    (x, y), carry = self.project(params, carry, self.draw_views(key, batch))  # [b e]
    on, off = redundancy(x, y)
    metrics = {"loss/on_diagonal": on, "loss/off_diagonal": off}
    return on + self.off_diagonal * off, LossOut(carry, metrics)


def build(
  run: Run,
  *,
  encoder: Mapping[str, Any],
  views: Mapping[str, Any],
  second: Mapping[str, Any] | None = None,
  projector: tuple[int, ...] = (8192, 8192, 8192),
  off_diagonal: float = 0.0051,
) -> BarlowTwins:
  """Barlow Twins for a run.

  Args:
    run: normalisation and compute dtype.
    encoder: arguments of `models.vit.vit`, `resnet` or `convnext`.
    views: fields of `data.augment.Augment` but mean and std.
    second: what differs in the second view.
    projector: hidden and output widths.
    off_diagonal: weight of the squared correlations between different features.

  Raises:
    ValueError: an unknown key, or a value that can't work.
  """
  values.not_negative(off_diagonal=off_diagonal)
  return BarlowTwins(
    encoder=build_encoder(run, encoder),
    # Its last norm, without scale and shift, is the standardisation that the loss asks for.
    projector=build_head(run, projector, where="method.projector", bias=False, out_norm="plain"),
    views=build_views(run, views, second),
    off_diagonal=off_diagonal,
  )
