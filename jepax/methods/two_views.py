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

from jepax.config import Run
from jepax.construct import construct
from jepax.core import Batch, Carry, Features, Params, ema, sample_keys
from jepax.data.augment import Augment
from jepax.data.views import MultiCrop
from jepax.models import encoder as encoders
from jepax.models.convnext import convnext
from jepax.models.heads import MLP
from jepax.models.vit import VARIANTS as VITS
from jepax.models.vit import vit
from jepax.names import one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoViews:
  """All of a `jepax.core.Method` but its loss.

  encoder: pooled is its class token, or without one the mean of its patches. Running statistics,
  where it has any, are carried, a set a branch; every view it trains on moves them.
  projector: [b d] -> [b e], with statistics of the batch it is given.
  views: device-side augmentation, two views of every image.
  """

  encoder: nn.Module
  projector: nn.Module
  views: Any

  branches: ClassVar[tuple[str, ...]] = ("online",)
  couples_batch: ClassVar[str] = "statistics"

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Carry]:
    """Encoder and projector parameters; nothing is carried but running statistics."""
    return self.init_networks(key, batch)[:2]

  def init_networks(self, key: jax.Array, batch: Batch) -> tuple[Params, Carry, jax.Array]:
    """What `init` returns, and a projection f32[b e]."""
    encoder_key, projector_key = jax.random.split(key)
    images = self.views.clean(batch["image"])
    weights = encoders.init(self.encoder, encoder_key, images)
    pooled = self.pooled(encoders.apply(self.encoder, weights, images))
    z, projector = self.projector.init_with_output(projector_key, pooled)
    encoder, statistics = encoders.split(weights)
    carry = {"statistics": {"online": statistics}} if statistics else {}
    return {"encoder": encoder, "projector": projector["params"]}, carry, z

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

  def tokens(
    self, params: Params, carry: Carry, images: jax.Array, *, branch: str = "online"
  ) -> tuple[jax.Array, Carry]:
    """f32[b h w c] -> [b n d] in training, and the carry with the statistics they moved."""
    weights = self.weights(params, carry, branch=branch)
    tokens, statistics = encoders.train(self.encoder, weights, images)
    if not statistics:
      return tokens, carry
    return tokens, {**carry, "statistics": {**carry["statistics"], branch: statistics}}

  def project(
    self, params: Params, carry: Carry, views: Sequence[jax.Array], *, branch: str = "online"
  ) -> tuple[list[jax.Array], Carry]:
    """Each view, f32[b h w c] -> f32[b e], and the carry with what they moved.

    Every view has a pass of its own, whose statistics it has; running ones move in their order.
    """
    z, projector = [], self.networks(params, carry, branch=branch)["projector"]
    for images in views:
      tokens, carry = self.tokens(params, carry, images, branch=branch)
      z.append(self.projector.apply({"params": projector}, self.pooled(tokens)))
    return z, carry

  def update(self, params: Params, carry: Carry, step: jax.Array) -> Carry:
    """Nothing persists beside the parameters."""
    return carry

  def networks(self, params: Params, carry: Carry, *, branch: str) -> Params:
    """The parameters of a branch's encoder and projector, under these names."""
    return params

  def weights(self, params: Params, carry: Carry, *, branch: str) -> Params:
    """The encoder's parameters, with its running statistics where it has any."""
    encoder = self.networks(params, carry, branch=branch)["encoder"]
    if "statistics" not in carry:
      return encoder
    return encoders.join(encoder, carry["statistics"][branch])

  def encode(self, params: Params, carry: Carry, batch: Batch, *, branch: str) -> Features:
    """The encoder's patch tokens and pooled feature, before the projector."""
    weights = self.weights(params, carry, branch=branch)
    tokens = encoders.apply(self.encoder, weights, self.views.clean(batch["image"]))
    return Features(tokens[:, self.encoder.prefix :], self.pooled(tokens))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predicting(TwoViews):
  """Two views, one of which is predicted from the other. predictor: [b e] -> [b e]."""

  predictor: nn.Module

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Carry]:
    """Encoder, projector and predictor parameters."""
    key, predictor_key = jax.random.split(key)
    params, carry, z = self.init_networks(key, batch)
    return {**params, "predictor": self.predictor.init(predictor_key, z)["params"]}, carry

  def predict(self, params: Params, z: jax.Array) -> jax.Array:
    """f32[b e] -> f32[b e]."""
    return self.predictor.apply({"params": params["predictor"]}, z)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithTarget(Predicting):
  """What is predicted comes from an EMA copy. momentum: step -> of the copy.

  Running statistics are not averaged: the copy has its own, from its own passes in training mode,
  as in the released codes of BYOL and MoCo v3.
  """

  momentum: Callable[[jax.Array], jax.Array]

  branches: ClassVar[tuple[str, ...]] = ("online", "target")

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Carry]:
    """The target starts as a copy of encoder and projector."""
    params, carry = super().init(key, batch)
    target = {name: params[name] for name in ("encoder", "projector")}
    carry = {**carry, "target": jax.tree.map(lambda x: x.copy(), target)}
    if "statistics" in carry:
      own = jax.tree.map(lambda x: x.copy(), carry["statistics"]["online"])
      carry["statistics"] = {**carry["statistics"], "target": own}
    return params, carry

  def update(self, params: Params, carry: Carry, step: jax.Array) -> Carry:
    """Moves the target towards encoder and projector, after the optimizer step."""
    online = {name: params[name] for name in carry["target"]}
    return {**carry, "target": ema(carry["target"], online, self.momentum(step))}

  def networks(self, params: Params, carry: Carry, *, branch: str) -> Params:
    """The parameters being trained, or the EMA target's."""
    return params if branch == "online" else carry[branch]


def spread(z: jax.Array) -> jax.Array:
  """How far directions spread: std of z / |z| a feature, times sqrt(e); 1 healthy, 0 collapse.

  Args:
    z: f32[b e].
  """
  z = z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
  return z.std(0).mean() * z.shape[-1] ** 0.5


# What says that a section was written for a ViT, or for another kind of encoder.
_VIT_ONLY = ("patch", "heads", "mlp_width", "depth", "activation")
_CONVOLUTIONAL_ONLY = ("stem", "depths", "bottleneck", "zero_init")


def build_encoder(run: Run, encoder: Mapping[str, Any]) -> nn.Module:
  """The encoder of a config's section `method.encoder`.

  Its `variant` says which: arguments of `models.vit.vit`, `models.resnet.resnet` or
  `models.convnext.convnext`.
  """
  make, fixed = vit, dict(registers=0, mask_token=False, drop_path=0.0)
  if "variant" in encoder:
    makers = dict.fromkeys(VITS, vit) | encoders.CONVOLUTIONAL
    make = makers[one_of(encoder["variant"], makers, where="method.encoder.variant")]
  if make is not vit:
    fixed = {"drop_path": 0.0} if make is convnext else {}
  others = _CONVOLUTIONAL_ONLY if make is vit else _VIT_ONLY
  foreign = [name for name in encoder if name in others]
  if foreign and "variant" in encoder:
    raise ValueError(
      f"method.encoder has {foreign}, which variant={encoder['variant']!r} does not take: to train "
      "another kind of encoder write the section anew, as configs/cifar10_resnet18.py does"
    )
  return construct(make, encoder, where="method.encoder", dtype=run.dtype, **fixed)


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
