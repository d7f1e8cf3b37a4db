"""BYOL: predict what an EMA copy of the network makes of the other view.

Source: arXiv 2006.07733.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jepax import losses
from jepax.config import Run
from jepax.core import Batch, Carry, LossOut, Params
from jepax.methods.two_views import (
  WithTarget,
  build_encoder,
  build_head,
  build_views,
  check_momentum,
  spread,
)
from jepax.optim import cosine


@dataclasses.dataclass(frozen=True, kw_only=True)
class BYOL(WithTarget):
  """BYOL; BatchNorm in all heads, the target's too, sees the global batch."""

  def loss(
    self, params: Params, carry: Carry, batch: Batch, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, LossOut]:
    """One batch: each view's prediction and the target's other view, |p - z|^2 on the sphere."""
    views, carry = self.draw_views(key, batch), jax.lax.stop_gradient(carry)
    (x, y), carry = self.project(params, carry, views)  # [b e]
    (target_x, target_y), carry = self.project(params, carry, views, branch="target")
    towards_y = losses.cosine(self.predict(params, x), target_y).mean()
    towards_x = losses.cosine(self.predict(params, y), target_x).mean()
    metrics = {"train/spread": spread(x), "schedule/momentum": self.momentum(step)}
    return 4 - 2 * towards_x - 2 * towards_y, LossOut(carry, metrics)


def build(
  run: Run,
  *,
  encoder: Mapping[str, Any],
  views: Mapping[str, Any],
  second: Mapping[str, Any] | None = None,
  projector: tuple[int, ...] = (4096, 256),
  predictor: int = 4096,
  momentum: tuple[float, float] = (0.996, 1.0),
) -> BYOL:
  """BYOL for a run.

  Args:
    run: normalisation, steps and compute dtype.
    encoder: arguments of `models.vit.vit`, `resnet` or `convnext`.
    views: fields of `data.augment.Augment` but mean and std.
    second: what differs in the second view.
    projector: hidden and output widths.
    predictor: hidden width.
    momentum: of the target at the first and the last step, a cosine between.

  Raises:
    ValueError: an unknown key, or a value that can't work.
  """
  check_momentum(momentum)
  head = dict(bias=False, out_bias=True)
  return BYOL(
    encoder=build_encoder(run, encoder),
    projector=build_head(run, projector, where="method.projector", **head),
    predictor=build_head(run, (predictor, projector[-1]), where="method.predictor", **head),
    views=build_views(run, views, second),
    momentum=cosine(*momentum, steps=run.steps),
  )
