"""Several views of every image, and the augmentation of each method by name.

A preset is a dict of config keys, `dict(name="byol", **views.byol())`: `views`, the fields of
`data.augment.Augment`, and where the second view differs from the first, `second`, what differs.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import chex
import jax

from jepax.data.augment import Augment


@dataclasses.dataclass(frozen=True)
class MultiCrop:
  """Views of one image: two for most methods, global and local crops of other sizes for some.

  crops: one Augment a view; runs of equal ones are traced once.
  """

  crops: tuple[Augment, ...]

  def __post_init__(self):
    if not self.crops or len({(crop.mean, crop.std) for crop in self.crops}) != 1:
      raise ValueError(f"crops must be one or more with one normalisation, found {self.crops}")

  def __call__(self, keys: jax.Array, images: jax.Array) -> tuple[jax.Array, ...]:
    """Draws every view of every image.

    Args:
      keys: one a view and sample, [v b] (or raw, u32[v b 2]).
      images: u8[b h w c].

    Returns:
      v views, each f32[b h_v w_v c].
    """
    chex.assert_axis_dimension(keys, 0, len(self.crops))
    views, start = [], 0
    for crop, run in itertools.groupby(self.crops):
      stop = start + len(list(run))
      views.extend(jax.vmap(crop, in_axes=(0, None))(keys[start:stop], images))
      start = stop
    return tuple(views)

  def clean(self, images: jax.Array) -> jax.Array:
    """Only normalises: u8[b h w c] -> f32[b h w c]."""
    return self.crops[0].clean(images)


def simclr(*, strength: float = 1.0, crop: float = 0.08) -> dict[str, Any]:
  """SimCLR's views: both alike. Source: arXiv 2002.05709, appendix A."""
  change = 0.8 * strength
  jitter = dict(brightness=change, contrast=change, saturation=change, hue=0.2 * strength)
  return dict(views=dict(_common(crop), **jitter, blur=0.5))


def byol() -> dict[str, Any]:
  """BYOL's two unequal views; also those of Barlow Twins, VICReg and MoCo v3 (ViT).

  Source: arXiv 2006.07733, table 6.
  """
  views = dict(_common(0.08), **_MILD, saturation=0.2, blur=1.0)
  return dict(views=views, second=dict(blur=0.1, solarise=0.2))


def simsiam() -> dict[str, Any]:
  """SimSiam's views: both alike. Source: arXiv 2011.10566, appendix A."""
  return dict(views=dict(_common(0.2), **_MILD, saturation=0.4, blur=0.5))


def lejepa(*, local_size: int = 96) -> dict[str, Any]:
  """LeJEPA's global views, and its local ones as `local`. Source: arXiv 2511.08544 and its code."""
  views = dict(_common(0.3), **_MILD, saturation=0.2, blur=0.5, solarise=0.2)
  return dict(views=views, local=dict(crop_scale=(0.05, 0.3), size=local_size))


def dino(*, local_size: int = 96) -> dict[str, Any]:
  """DINOv2's two global views, and its local ones as `local`.

  Blur as the released code applies it, with 1 - p: never in the first view, in nine of ten second
  ones. Source: arXiv 2304.07193; facebookresearch/dinov2, dinov2/data/augmentations.py.
  """
  colour = dict(**_MILD, saturation=0.2)
  views = dict(_common(0.32), **colour)
  local = dict(_common(0.05), **colour) | dict(crop_scale=(0.05, 0.32), size=local_size, blur=0.5)
  return dict(views=views, second=dict(blur=0.9, solarise=0.2), local=local)


_MILD = dict(brightness=0.4, contrast=0.4, hue=0.1)


def _common(smallest: float) -> dict[str, Any]:
  return dict(
    crop_scale=(smallest, 1.0),
    interpolation="bicubic",
    flip=0.5,
    jitter=0.8,
    shuffle=True,
    grey=0.2,
  )
