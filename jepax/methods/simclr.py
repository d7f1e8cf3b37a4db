"""SimCLR: each view finds its twin among all other views of the batch.

Source: arXiv 2002.05709.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp

from jepax import losses
from jepax.config import Run
from jepax.core import Batch, Carry, LossOut, Params
from jepax.methods.two_views import TwoViews, build_encoder, build_head, build_views, spread


def nt_xent(x: jax.Array, y: jax.Array, *, temperature: float) -> jax.Array:
  """Mean over all 2b views of the cross-entropy of finding the twin among the other 2b - 1.

  The four b x b blocks of the similarity matrix are made one by one, so that rows stay on the
  device that has them.

  Args:
    x, y: [b e], two views of the global batch; row i of both is one image.
    temperature: above 0.

  Returns:
    f32[].

  Source: arXiv 2002.05709, eq. 1.
  """
  chex.assert_equal_shape([x, y])
  x, y = losses.normalise(x), losses.normalise(y)
  itself = jnp.eye(x.shape[0], dtype=bool)

  def one_side(own, other):
    across = losses.matmul(own, other.T) / temperature
    along = jnp.where(itself, -jnp.inf, losses.matmul(own, own.T) / temperature)
    return jax.nn.logsumexp(jnp.concatenate([across, along], 1), axis=1)

  twin = (x * y).sum(-1) / temperature
  return jnp.mean((one_side(x, y) + one_side(y, x)) / 2 - twin)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimCLR(TwoViews):
  """SimCLR; negatives are those of the global batch. temperature: of the softmax, above 0."""

  temperature: float = 0.1

  couples_batch: ClassVar[str] = "negatives"

  def __post_init__(self):
    losses.check_temperature(self.temperature)

  def loss(
    self, params: Params, carry: Carry, batch: Batch, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, LossOut]:
    """One batch: two views, encode and project each, contrast."""
    (x, y), carry = self.project(params, carry, self.draw_views(key, batch))  # [b e]
    metrics = {"train/alignment": losses.cosine(x, y).mean(), "train/spread": spread(x)}
    return nt_xent(x, y, temperature=self.temperature), LossOut(carry, metrics)


def build(
  run: Run,
  *,
  encoder: Mapping[str, Any],
  views: Mapping[str, Any],
  second: Mapping[str, Any] | None = None,
  projector: tuple[int, ...] = (2048, 128),
  temperature: float = 0.1,
) -> SimCLR:
  """SimCLR for a run.

  Args:
    run: normalisation and compute dtype.
    encoder: arguments of `models.vit.vit`, `resnet` or `convnext`.
    views: fields of `data.augment.Augment` but mean and std.
    second: what differs in the second view.
    projector: hidden and output widths.
    temperature: of the softmax, above 0.

  Raises:
    ValueError: an unknown key, or a value that can't work.
  """
  return SimCLR(
    encoder=build_encoder(run, encoder),
    projector=build_head(run, projector, where="method.projector", bias=False, out_norm="affine"),
    views=build_views(run, views, second),
    temperature=temperature,
  )
