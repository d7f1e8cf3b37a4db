"""MoCo v3: contrast predictions with the keys of a momentum encoder; no queue.

Source: arXiv 2104.02057; the formulas only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

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
from jepax.models.vit import ViT
from jepax.optim import cosine


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCoV3(WithTarget):
  """MoCo v3; keys are those of the global batch.

  temperature: of the softmax, above 0. frozen_patches: the patch projection stays as initialised;
  it is then carried, where neither gradient nor weight decay moves it.
  """

  temperature: float = 0.2
  frozen_patches: bool = True

  couples_batch: ClassVar[str] = "negatives"

  def __post_init__(self):
    losses.check_temperature(self.temperature)

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Carry]:
    """As with any target, but for the frozen patch projection."""
    params, carry = super().init(key, batch)
    if not self.frozen_patches:
      return params, carry
    encoder, target = dict(params["encoder"]), dict(carry["target"]["encoder"])
    frozen, _ = encoder.pop("embed"), target.pop("embed")
    carry = {**carry, "target": {**carry["target"], "encoder": target}, "embed": frozen}
    return {**params, "encoder": encoder}, carry

  def loss(
    self, params: Params, carry: Carry, batch: Batch, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, LossOut]:
    """One batch: each view's query finds its key among those of the other view."""
    views, carry = self.draw_views(key, batch), jax.lax.stop_gradient(carry)
    queries, carry = self.project(params, carry, views)
    (key_x, key_y), carry = self.project(params, carry, views, branch="target")  # [b e]
    query_x, query_y = (self.predict(params, z) for z in queries)
    tau = self.temperature
    loss = losses.info_nce(query_x, key_y, temperature=tau)
    loss = 2 * tau * (loss + losses.info_nce(query_y, key_x, temperature=tau))
    metrics = {"train/spread": spread(query_x), "schedule/momentum": self.momentum(step + 1)}
    return loss, LossOut(carry, metrics)

  def update(self, params: Params, carry: Carry, step: jax.Array) -> Carry:
    """Moves the target after the optimizer step, by the momentum of the next one.

    The reference moves it between a step's queries and its keys, which is the same: there too
    the keys see the weights of their step, and the first move is of equal weights.
    """
    return super().update(params, carry, step + 1)

  def weights(self, params: Params, carry: Carry, *, branch: str) -> Params:
    """A whole encoder, with the frozen patch projection."""
    weights = super().weights(params, carry, branch=branch)
    return {**weights, "embed": carry["embed"]} if self.frozen_patches else weights


def build(
  run: Run,
  *,
  encoder: Mapping[str, Any],
  views: Mapping[str, Any],
  second: Mapping[str, Any] | None = None,
  projector: tuple[int, ...] = (4096, 4096, 256),
  predictor: int = 4096,
  temperature: float = 0.2,
  momentum: tuple[float, float] = (0.99, 1.0),
  frozen_patches: bool = True,
) -> MoCoV3:
  """MoCo v3 for a run.

  Args:
    run: normalisation, steps and compute dtype.
    encoder: arguments of `models.vit.vit`, `resnet` or `convnext`; the paper's ViTs have a class
      token.
    views: fields of `data.augment.Augment` but mean and std.
    second: what differs in the second view.
    projector: hidden and output widths.
    predictor: hidden width.
    temperature: of the softmax, above 0.
    momentum: of the target at the first and the last step, a cosine between.
    frozen_patches: keep the patch projection as initialised.

  Raises:
    ValueError: an unknown key, or a value that can't work.
  """
  check_momentum(momentum)
  head = dict(bias=False, out_norm="plain")
  network = build_encoder(run, encoder)
  if frozen_patches and not isinstance(network, ViT):
    raise ValueError(
      f"method.frozen_patches is for a ViT, and {encoder['variant']!r} embeds no patches: set it "
      "to False"
    )
  return MoCoV3(
    encoder=network,
    projector=build_head(run, projector, where="method.projector", **head),
    predictor=build_head(run, (predictor, projector[-1]), where="method.predictor", **head),
    views=build_views(run, views, second),
    temperature=temperature,
    momentum=cosine(*momentum, steps=run.steps),
    frozen_patches=frozen_patches,
  )
