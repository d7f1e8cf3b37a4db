"""Global and local crops of every image, on the device, each of a size of its own."""

from __future__ import annotations

import dataclasses
import itertools

import chex
import jax

from jepax.data.augment import _CROP, Augment, crop_resize


@dataclasses.dataclass(frozen=True)
class Crop(Augment):
  """An Augment whose views are squares of `size` pixels; None for the image's own size."""

  size: int | None = None

  def __post_init__(self):
    super().__post_init__()
    if self.size is not None and self.size < 1:
      raise ValueError(f"size must be at least 1 pixel, found {self.size}")

  def _one(self, key: jax.Array, image: jax.Array) -> jax.Array:
    if self.size is None:
      return super()._one(key, image)
    box = self._box(jax.random.fold_in(key, _CROP), *image.shape[:2])
    image = crop_resize(image, box, height=self.size, width=self.size)
    return dataclasses.replace(self, crop_scale=(1.0, 1.0), size=None)._one(key, image)


@dataclasses.dataclass(frozen=True)
class MultiCrop:
  """Several views of every image.

  crops: one Augment a view; runs of equal ones are traced once.
  """

  crops: tuple[Augment, ...]

  def __post_init__(self):
    if not self.crops or len({(crop.mean, crop.std) for crop in self.crops}) != 1:
      raise ValueError(f"crops must be one or more with one normalisation, found {self.crops}")

  def __call__(self, keys: jax.Array, images: jax.Array) -> tuple[jax.Array, ...]:
    """Draws every view of every image.

    Args:
      keys: one a view and sample, [v b].
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
