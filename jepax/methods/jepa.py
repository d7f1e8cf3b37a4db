"""JEPA: predict the target encoder's output at hidden tokens from the visible ones.

Any encoder, any predictor, any masks, any objective. I-JEPA is a preset (`ijepa.py`).
Source: arXiv 2301.08243; facebookresearch/ijepa 52c1ae9 (src/train.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jepax import losses
from jepax.core import Batch, Carry, Features, LossOut, Params, ema, sample_keys
from jepax.masks.tokens import gather
from jepax.names import one_of
from jepax.regularisers import Contrast, Regulariser


@dataclasses.dataclass(frozen=True, kw_only=True)
class JEPA:
  """The joint-embedding predictive architecture as a `jepax.core.Method`.

  encoder: linen module (images f32[b h w c], TokenSet or None) -> [b n d].
  predictor: linen module (context [b k d], its TokenSet, target TokenSet, grid=) -> [b m t d].
  masks: sampler (sample keys [b], step key) -> context and target TokenSets.
  views: device-side augmentation (keys, images u8) -> f32, with `clean(images)`.
  momentum: step -> EMA momentum of the target.
  objective: name of an elementwise loss in `losses.OBJECTIVES`.
  target_norm: of the target's tokens, a name in `losses.TARGET_NORMS`.
  grid: patches (rows, columns) of an image.
  regulariser: from `regularisers`, on the context's tokens; None for none.
  contrast: likewise, of pooled predictions and targets, the batch's others as negatives; None for
    none. With either of the two the loss couples the batch.
  """

  encoder: nn.Module
  predictor: nn.Module
  masks: Any
  views: Any
  momentum: Callable[[jax.Array], jax.Array]
  grid: tuple[int, int]
  objective: str = "smooth_l1"
  target_norm: str = "layer_norm"
  regulariser: Regulariser | None = None
  contrast: Contrast | None = None

  branches: ClassVar[tuple[str, ...]] = ("target", "online")
  pool: ClassVar[str] = "mean"

  @property
  def couples_batch(self) -> str:
    """With neither contrast nor regulariser every sample has a loss of its own."""
    if self.contrast is not None:
      return "negatives"
    return "" if self.regulariser is None else "statistics"

  def __post_init__(self):
    one_of(self.objective, losses.OBJECTIVES, where="objective")
    one_of(self.target_norm, losses.TARGET_NORMS, where="target_norm")

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Carry]:
    """Encoder and predictor parameters; the target starts as a copy of the encoder."""
    encoder_key, predictor_key = jax.random.split(key)
    images = self.views.clean(batch["image"])
    masks = self.draw_masks(key, batch)
    encoder = self.encoder.init(encoder_key, images, masks.context)["params"]
    context = self.encoder.apply({"params": encoder}, images, masks.context)
    predictor = self.predictor.init(
      predictor_key, context, masks.context, masks.targets, grid=self.grid
    )["params"]
    target = jax.tree.map(lambda x: x.copy(), encoder)  # its own buffers: the state is donated
    return {"encoder": encoder, "predictor": predictor}, {"target": target}

  def draw_masks(self, key: jax.Array, batch: Batch) -> Any:
    """The context and targets of every sample, from the step's key."""
    sample_key, step_key = jax.random.split(key)
    return self.masks(sample_keys(sample_key, batch, count=batch["image"].shape[0]), step_key)

  def loss(
    self, params: Params, carry: Carry, batch: Batch, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, LossOut]:
    """One batch: view, mask, target, context, prediction, comparison."""
    view_key, mask_key = jax.random.split(key)
    keys = sample_keys(view_key, batch, count=batch["image"].shape[0])
    images = self.views(keys, batch["image"])  # [b h w c]
    masks = self.draw_masks(mask_key, batch)

    # The target encoder sees the whole image; blocks are cut from its output.
    target = self.encoder.apply({"params": carry["target"]}, images)  # [b n d]
    target = jax.lax.stop_gradient(losses.TARGET_NORMS[self.target_norm](target))
    target = gather(target, masks.targets)  # [b m t d]

    context = self.encoder.apply({"params": params["encoder"]}, images, masks.context)  # [b k d]
    prediction = self.predictor.apply(
      {"params": params["predictor"]}, context, masks.context, masks.targets, grid=self.grid
    )  # [b m t d]
    error = losses.OBJECTIVES[self.objective](prediction, target)
    loss = losses.token_mean(error, masks.targets.valid)
    each = losses.token_means(error, masks.targets.valid)
    metrics = {
      "schedule/momentum": self.momentum(step),
      **masks.metrics(),
    }
    if self.couples_batch:
      metrics |= {"loss/prediction": loss}
    if self.regulariser is not None:
      third_key = jax.random.fold_in(key, 2)  # the split above is fold_in of 0 and 1
      penalty, parts = self.regulariser(context, masks.context.valid, third_key)
      metrics |= parts
      loss = loss + penalty
    if self.contrast is not None:
      penalty, parts = self.contrast(prediction, target, masks.targets.valid)
      metrics |= parts
      loss = loss + penalty
    return loss, LossOut(carry, metrics, None if self.couples_batch else each)

  def update(self, params: Params, carry: Carry, step: jax.Array) -> Carry:
    """Moves the target towards the encoder, after the optimizer step."""
    return {"target": ema(carry["target"], params["encoder"], self.momentum(step))}

  def weights(self, params: Params, carry: Carry, *, branch: str) -> Params:
    """The encoder's parameters: the EMA target's, or the ones being trained."""
    return {"target": carry["target"], "online": params["encoder"]}[branch]

  def encode(self, params: Params, carry: Carry, batch: Batch, *, branch: str) -> Features:
    """All patches, no masks, no augmentation; pooled is their mean."""
    weights = self.weights(params, carry, branch=branch)
    tokens = self.encoder.apply({"params": weights}, self.views.clean(batch["image"]))
    return Features(tokens, tokens.mean(1))
