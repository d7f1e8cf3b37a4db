"""LeJEPA: views of an image share one place, and places are spread as an isotropic Gaussian.

No teacher, no predictor, no stopped gradient: an invariance term and SIGReg (`jepax.sigreg`).
Source: arXiv 2511.08544 and the package `lejepa` eddffdd.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jepax import values
from jepax.config import Run
from jepax.construct import construct
from jepax.core import Batch, Carry, LossOut, Params
from jepax.data.augment import Augment
from jepax.data.views import MultiCrop
from jepax.methods.two_views import TwoViews, build_encoder, build_head
from jepax.names import one_of
from jepax.sigreg import draw_directions, sigreg


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convention:
  """How an implementation weighs the two terms; a weight means nothing without it.

  centre: what every view is drawn to: the mean of the 'globals', of 'all' views, or in 'pairs' each
    of the others.
  total: the squared distance is summed over features, else averaged.
  flat: one statistic over the samples of all views together, else one a view, averaged.
  times_samples: the statistic grows with the number of samples.
  convex: the invariance has 1 - weight, else 1.
  weight: of SIGReg, as published with it.
  """

  centre: str = "globals"
  total: bool = False
  flat: bool = False
  times_samples: bool = True
  convex: bool = True
  weight: float


CONVENTIONS = {
  "paper_formula": Convention(weight=0.05, total=True),
  "paper": Convention(weight=0.05),  # Algorithm 2
  "minimal": Convention(weight=0.02, centre="all"),  # the package's MINIMAL.md
  "stable_pretraining": Convention(weight=0.02, flat=True, convex=False),
  "eb_jepa": Convention(weight=10.0, centre="pairs", times_samples=False, convex=False),
}


def invariance(z: jax.Array, *, convention: Convention, global_views: int) -> jax.Array:
  """How far apart the views of an image are: mean over views and samples, f32[].

  Args:
    z: f32[v b e], the global views first.
    convention: its centre and its reduction over features.
    global_views: how many they are.
  """
  centre = z[:global_views] if convention.centre == "globals" else z
  error = jnp.square(z - centre.mean(0))
  error = error.sum(-1).mean() if convention.total else error.mean()
  # The mean over pairs of different views is twice their unbiased variance.
  pairs = 2 * len(z) / (len(z) - 1)
  return error * pairs if convention.centre == "pairs" else error


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeJEPA(TwoViews):
  """LeJEPA; means of SIGReg and BatchNorm are over the global batch.

  views: a MultiCrop, the global views first. global_views: how many they are.
  convention: name in CONVENTIONS. weight: of SIGReg.
  slices: random directions a step. t_max, nodes: see `sigreg.epps_pulley`.
  """

  global_views: int = 2
  convention: str = "paper"
  weight: float = 0.05
  slices: int = 1024
  t_max: float = 3.0
  nodes: int = 17

  def __post_init__(self):
    one_of(self.convention, CONVENTIONS, where="convention")
    if not 1 <= self.global_views <= len(self.views.crops) or len(self.views.crops) < 2:
      raise ValueError(
        f"2 views or more are needed, 1 or more of them global; found {len(self.views.crops)} "
        f"with global_views={self.global_views}"
      )
    if self.slices < 1:
      raise ValueError(f"slices must be at least 1, found {self.slices}")

  def loss(
    self, params: Params, carry: Carry, batch: Batch, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, LossOut]:
    """One batch: views, embed all, draw them together and their distribution to a Gaussian."""
    view_key, slice_key = jax.random.split(key)
    z, carry = self.embed(params, carry, self.draw_views(view_key, batch))  # [v b e]
    how = CONVENTIONS[self.convention]
    together = invariance(z, convention=how, global_views=self.global_views)
    directions = draw_directions(slice_key, width=z.shape[-1], count=self.slices)
    samples = rearrange(z, "v b e -> (b v) e") if how.flat else z
    statistic = sigreg(
      samples, directions, t_max=self.t_max, nodes=self.nodes, times_samples=how.times_samples
    )
    loss = (1 - self.weight if how.convex else 1.0) * together + self.weight * statistic
    metrics = {"loss/invariance": together, "loss/sigreg": statistic}
    return loss, LossOut(carry, {**metrics, "train/embedding_std": z[0].std(0).mean()})

  def embed(
    self, params: Params, carry: Carry, views: tuple[jax.Array, ...]
  ) -> tuple[jax.Array, Carry]:
    """All views, f32[v b e]: those of one size in one pass, BatchNorm over all samples of all."""
    pooled = []
    for _, same in itertools.groupby(views, key=jnp.shape):
      images = jnp.stack(list(same), 1)  # [b v h w c], so that rows stay on their device
      rows = rearrange(images, "b v h w c -> (b v) h w c")
      tokens, carry = self.tokens(params, carry, rows)
      pooled.append(rearrange(self.pooled(tokens), "(b v) d -> b v d", v=images.shape[1]))
    pooled = rearrange(jnp.concatenate(pooled, 1), "b v d -> (b v) d")
    z = self.projector.apply({"params": params["projector"]}, pooled)
    return rearrange(z, "(b v) e -> v b e", v=len(views)), carry


def build(
  run: Run,
  *,
  encoder: Mapping[str, Any],
  views: Mapping[str, Any],
  local: Mapping[str, Any] | None = None,
  global_views: int = 2,
  local_views: int = 0,
  projector: tuple[int, ...] = (2048, 2048, 64),
  convention: str = "paper",
  weight: float | None = None,
  slices: int = 1024,
  t_max: float = 3.0,
  nodes: int = 17,
) -> LeJEPA:
  """LeJEPA for a run.

  Args:
    run: normalisation and compute dtype.
    encoder: arguments of `models.vit.vit`, `resnet` or `convnext`.
    views: fields of `data.augment.Augment` but mean and std, of the global views.
    local: what differs in the local views: their size, their crop_scale.
    global_views: how many; at 0 local views, all there are.
    local_views: how many.
    projector: hidden and output widths.
    convention: whose weighting of the two terms, a name in CONVENTIONS.
    weight: of SIGReg; None for the convention's own. Where samples count, tied to batch_size.
    slices: random directions a step.
    t_max: largest node of the statistic.
    nodes: of the statistic, from 0 to t_max.

  Raises:
    ValueError: an unknown key, or a value that can't work.
  """
  fixed = dict(mean=run.mean, std=run.std)
  crop = construct(Augment, views, where="method.views", **fixed)
  small = construct(Augment, {**views, **(local or {})}, where="method.local", **fixed)
  one_of(convention, CONVENTIONS, where="method.convention")
  weight = CONVENTIONS[convention].weight if weight is None else weight
  values.not_negative(local_views=local_views, weight=weight)
  if CONVENTIONS[convention].convex and weight > 1:
    raise ValueError(
      f"method.weight={weight} must lie in [0, 1]: {convention!r} weighs the two terms by it and 1 "
      "minus it"
    )
  return LeJEPA(
    encoder=build_encoder(run, encoder),
    projector=build_head(run, projector, where="method.projector", out_bias=True),
    views=MultiCrop((crop,) * global_views + (small,) * local_views),
    global_views=global_views,
    convention=convention,
    weight=weight,
    slices=slices,
    t_max=t_max,
    nodes=nodes,
  )
