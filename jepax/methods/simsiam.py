"""SimSiam: a predictor on one side, a stopped gradient on the other, and no more.

Source: arXiv 2011.10566; the formulas only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jepax import losses
from jepax.config import Run
from jepax.core import Batch, Carry, LossOut, Params
from jepax.methods.two_views import Predicting, build_encoder, build_head, build_views, spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimSiam(Predicting):
  """SimSiam; BatchNorm in both heads sees the global batch."""

  def loss(
    self, params: Params, carry: Carry, batch: Batch, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, LossOut]:
    """One batch: each view's prediction points where the other view does."""
    (x, y), carry = self.project(params, carry, self.draw_views(key, batch))  # [b e]
    towards_y = losses.cosine(self.predict(params, x), jax.lax.stop_gradient(y)).mean()
    towards_x = losses.cosine(self.predict(params, y), jax.lax.stop_gradient(x)).mean()
    metrics = {"train/alignment": losses.cosine(x, y).mean(), "train/spread": spread(x)}
    return -(towards_x + towards_y) / 2, LossOut(carry, metrics)


def build(
  run: Run,
  *,
  encoder: Mapping[str, Any],
  views: Mapping[str, Any],
  second: Mapping[str, Any] | None = None,
  projector: tuple[int, ...] = (2048, 2048, 2048),
  predictor: int = 512,
) -> SimSiam:
  """SimSiam for a run.

  Args:
    run: normalisation and compute dtype.
    encoder: arguments of `models.vit.vit`, `resnet` or `convnext`.
    views: fields of `data.augment.Augment` but mean and std.
    second: what differs in the second view.
    projector: hidden and output widths.
    predictor: hidden width; it is narrower than the projector on purpose.

  Raises:
    ValueError: an unknown key, or a value that can't work.
  """
  head = build_head(run, projector, where="method.projector", bias=False, out_norm="plain")
  back = (predictor, head.widths[-1])
  return SimSiam(
    encoder=build_encoder(run, encoder),
    projector=head,
    predictor=build_head(run, back, where="method.predictor", bias=False, out_bias=True),
    views=build_views(run, views, second),
  )
