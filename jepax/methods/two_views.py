"""What the methods with two views share: both through one encoder and one projector.

A method is one of the three classes below with a `loss` of its own:

  TwoViews     encoder, projector                     Barlow Twins, VICReg, SimCLR
  Predicting   and a predictor on one side            SimSiam
  WithTarget   and an EMA copy on the other           BYOL, MoCo v3
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jepax.config import Run, construct
from jepax.core import Batch, Carry, Features, Params, ema, sample_keys
from jepax.data.augment import Augment
from jepax.data.views import MultiCrop
from jepax.models.heads import MLP
from jepax.models.vit import ViT, vit


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoViews:
  """All of a `jepax.core.Method` but its loss.

  encoder: a ViT; pooled is its class token, or without one the mean of its patches.
  projector: [b d] -> [b e], with statistics of the batch it is given.
  views: device-side augmentation, two views of every image.
  """

  encoder: nn.Module
  projector: nn.Module
  views: Any

  branches: ClassVar[tuple[str, ...]] = ("online",)
  couples_batch: ClassVar[bool] = True

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Carry]:
    """Encoder and projector parameters; nothing is carried."""
    encoder_key, projector_key = jax.random.split(key)
    images = self.views.clean(batch["image"])
    encoder = self.encoder.init(encoder_key, images)["params"]
    pooled = self.pooled(self.encoder.apply({"params": encoder}, images))
    projector = self.projector.init(projector_key, pooled)["params"]
    return {"encoder": encoder, "projector": projector}, {}

  def draw_views(self, key: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
    """Every view of every image, f32[b h w c] each, from the step's key."""
    images = batch["image"]
    view_keys = jax.random.split(key, len(self.views.crops))
    keys = [sample_keys(view_key, batch, count=images.shape[0]) for view_key in view_keys]
    return self.views(jnp.stack(keys), images)

  @property
  def pool(self) -> str:
    """By the class token where there is one."""
    return "class" if self.encoder.class_token else "mean"

  def pooled(self, tokens: jax.Array) -> jax.Array:
    """[b n d] -> [b d]."""
    return tokens[:, 0] if self.pool == "class" else tokens.mean(1)

  def project(self, params: Params, images: jax.Array) -> jax.Array:
    """One view, f32[b h w c] -> f32[b e]; a call of its own for each, whose statistics it has."""
    tokens = self.encoder.apply({"params": params["encoder"]}, images)
    return self.projector.apply({"params": params["projector"]}, self.pooled(tokens))

  def update(self, params: Params, carry: Carry, step: jax.Array) -> Carry:
    """Nothing persists beside the parameters."""
    return carry

  def weights(self, params: Params, carry: Carry, *, branch: str) -> Params:
    """The encoder's parameters."""
    return params["encoder"]

  def encode(self, params: Params, carry: Carry, batch: Batch, *, branch: str) -> Features:
    """The encoder's patch tokens and pooled feature, before the projector."""
    weights = self.weights(params, carry, branch=branch)
    tokens = self.encoder.apply({"params": weights}, self.views.clean(batch["image"]))
    return Features(tokens[:, self.encoder.prefix :], self.pooled(tokens))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predicting(TwoViews):
  """Two views, one of which is predicted from the other. predictor: [b e] -> [b e]."""

  predictor: nn.Module

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Carry]:
    """Encoder, projector and predictor parameters."""
    key, predictor_key = jax.random.split(key)
    params, carry = super().init(key, batch)
    z = self.project(params, self.views.clean(batch["image"]))
    return {**params, "predictor": self.predictor.init(predictor_key, z)["params"]}, carry

  def predict(self, params: Params, z: jax.Array) -> jax.Array:
    """f32[b e] -> f32[b e]."""
    return self.predictor.apply({"params": params["predictor"]}, z)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithTarget(Predicting):
  """What is predicted comes from an EMA copy. momentum: step -> of the copy."""

  momentum: Callable[[jax.Array], jax.Array]

  branches: ClassVar[tuple[str, ...]] = ("online", "target")

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Carry]:
    """The target starts as a copy of encoder and projector."""
    params, carry = super().init(key, batch)
    target = {name: params[name] for name in ("encoder", "projector")}
    return params, {**carry, "target": jax.tree.map(lambda x: x.copy(), target)}

  def update(self, params: Params, carry: Carry, step: jax.Array) -> Carry:
    """Moves the target towards encoder and projector, after the optimizer step."""
    online = {name: params[name] for name in carry["target"]}
    return {**carry, "target": ema(carry["target"], online, self.momentum(step))}

  def weights(self, params: Params, carry: Carry, *, branch: str) -> Params:
    """The parameters being trained, or the EMA target's."""
    return {"online": params, "target": carry["target"]}[branch]["encoder"]


def spread(z: jax.Array) -> jax.Array:
  """How far directions spread: std of z / |z| a feature, times sqrt(e); 1 healthy, 0 collapse.

  Args:
    z: f32[b e].
  """
  z = z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
  return z.std(0).mean() * z.shape[-1] ** 0.5


def build_encoder(run: Run, encoder: Mapping[str, Any]) -> ViT:
  """The encoder of a config's section `method.encoder`, arguments of `models.vit.vit`."""
  fixed = dict(registers=0, mask_token=False, drop_path=0.0)
  return construct(vit, encoder, where="method.encoder", dtype=run.dtype, **fixed)


def build_head(run: Run, widths: Sequence[int], *, where: str, **fields: Any) -> MLP:
  """A head of hidden and output widths that a config gives.

  Raises:
    ValueError: fewer than two widths, or one that is no whole number of at least 1.
  """
  widths = tuple(widths)
  if len(widths) < 2 or any(not isinstance(w, int) or w < 1 for w in widths):
    raise ValueError(
      f"{where}={widths} must be hidden widths and the output's, whole numbers of at least 1, such "
      "as (2048, 128)"
    )
  return MLP(widths=widths, dtype=run.dtype, **fields)


def build_views(
  run: Run, views: Mapping[str, Any], second: Mapping[str, Any] | None = None
) -> MultiCrop:
  """Two views from `method.views`, fields of `data.augment.Augment`, and what `second` changes."""
  fixed = dict(mean=run.mean, std=run.std)
  first = construct(Augment, views, where="method.views", **fixed)
  changed = {**views, **(second or {})}
  return MultiCrop((first, construct(Augment, changed, where="method.second", **fixed)))


def check_momentum(momentum: tuple[float, float]) -> None:
  """Raises ValueError unless it is (first, last) with 0 <= first <= last <= 1."""
  if not 0 <= momentum[0] <= momentum[1] <= 1:
    raise ValueError(f"method.momentum={momentum} must be (first, last), 0 <= first <= last <= 1")
