"""MAE: reconstruct the pixels of hidden patches. No target network, no carried state.

Source: arXiv 2111.06377; the formulas only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jepax import losses
from jepax.config import Run
from jepax.construct import construct
from jepax.core import Batch, Carry, Features, LossOut, Params, Reconstruction, sample_keys
from jepax.data.augment import Augment
from jepax.masks.random import Random
from jepax.masks.tokens import Masks, TokenSet, gather, to_bool
from jepax.methods.masking import build_vit
from jepax.models.decoder import PixelDecoder
from jepax.models.vit import patchify, unpatchify


def patch_targets(patches: jax.Array, *, normalize: bool) -> jax.Array:
  """What the decoder predicts: pixels, or pixels standardised within each patch.

  Args:
    patches: f32[... p*p*c] of normalised pixels.
    normalize: subtract the patch's mean, divide by its (unbiased) standard deviation.
  """
  if not normalize:
    return patches
  mean, variance = _statistics(patches)
  return (patches - mean) * jax.lax.rsqrt(variance)


def patch_pixels(targets: jax.Array, patches: jax.Array, *, normalize: bool) -> jax.Array:
  """The inverse of `patch_targets`, by the mean and standard deviation of the true patches.

  Args:
    targets: f32[... p*p*c], true or predicted.
    patches: f32[... p*p*c], the true patches.
    normalize: whether the targets were standardised.
  """
  if not normalize:
    return targets
  mean, variance = _statistics(patches)
  return targets * jnp.sqrt(variance) + mean


def _statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and (unbiased) variance, the latter above 0."""
  return patches.mean(-1, keepdims=True), patches.var(-1, keepdims=True, ddof=1) + 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAE:
  """Masked autoencoder as a `jepax.core.Method`.

  encoder: a ViT with a class token. decoder: a PixelDecoder. masks: sampler whose context is
  seen and whose single target set is hidden. views: device-side augmentation.
  grid: patches (rows, columns). normalize_patches: standardise the target of each patch.
  """

  encoder: nn.Module
  decoder: nn.Module
  masks: Any
  views: Any
  grid: tuple[int, int]
  normalize_patches: bool = True

  branches: ClassVar[tuple[str, ...]] = ("online",)
  pool: ClassVar[str] = "mean"
  couples_batch: ClassVar[str] = ""

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Carry]:
    """Encoder and decoder parameters; nothing is carried."""
    encoder_key, decoder_key = jax.random.split(key)
    images = self.views.clean(batch["image"])
    visible, hidden = _sets(self.draw_masks(key, batch))
    encoder = self.encoder.init(encoder_key, images, visible)["params"]
    x = self.encoder.apply({"params": encoder}, images, visible)
    decoder = self.decoder.init(decoder_key, x, visible, hidden, grid=self.grid)["params"]
    return {"encoder": encoder, "decoder": decoder}, {}

  def draw_masks(self, key: jax.Array, batch: Batch) -> Masks:
    """Context (visible) and the one target set (hidden) of every sample, from the step's key."""
    sample_key, step_key = jax.random.split(key)
    return self.masks(sample_keys(sample_key, batch, count=batch["image"].shape[0]), step_key)

  def loss(
    self, params: Params, carry: Carry, batch: Batch, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, LossOut]:
    """One batch: view, mask, encode the visible, reconstruct the hidden, compare."""
    view_key, mask_key = jax.random.split(key)
    keys = sample_keys(view_key, batch, count=batch["image"].shape[0])
    images = self.views(keys, batch["image"])
    masks = self.draw_masks(mask_key, batch)
    visible, hidden = _sets(masks)

    prediction = self._predict(params, images, visible, hidden)  # [b t p*p*c]
    target = gather(patchify(images, patch=self.encoder.patch), hidden)
    target = patch_targets(target, normalize=self.normalize_patches)
    error = losses.squared(prediction, target)
    loss, each = (f(error, hidden.valid) for f in (losses.token_mean, losses.token_means))
    return loss, LossOut(carry, masks.metrics(), each)

  def _predict(
    self, params: Params, images: jax.Array, visible: TokenSet, hidden: TokenSet
  ) -> jax.Array:
    """What the hidden patches are taken for, f32[b t p*p*c], by the visible ones."""
    x = self.encoder.apply({"params": params["encoder"]}, images, visible)  # [b 1+k d]
    return self.decoder.apply({"params": params["decoder"]}, x, visible, hidden, grid=self.grid)

  def reconstruct(
    self, params: Params, carry: Carry, batch: Batch, key: jax.Array
  ) -> Reconstruction:
    """Images, not augmented, with their hidden patches predicted: to look at.

    With normalize_patches a prediction lacks brightness and contrast, and is given the mean and
    standard deviation of the very patch that is hidden. These the model does not know: a picture
    then looks better than what it predicts.

    Args:
      params, carry, batch: as of `encode`.
      key: of the masks.
    """
    images = self.views.clean(batch["image"])
    visible, hidden = _sets(self.draw_masks(key, batch))
    patches = patchify(images, patch=self.encoder.patch)
    predicted = patch_pixels(
      self._predict(params, images, visible, hidden),
      gather(patches, hidden),
      normalize=self.normalize_patches,
    )  # [b t p*p*c]
    at = jnp.where(hidden.valid, hidden.index, patches.shape[1])  # out of bounds: dropped
    filled = jax.vmap(lambda row, i, x: row.at[i].set(x, mode="drop"))(patches, at, predicted)
    whole = unpatchify(filled, grid=self.grid, patch=self.encoder.patch)
    return Reconstruction(
      pixels=self.views.pixels(whole), is_masked=to_bool(hidden, count=patches.shape[1])
    )

  def update(self, params: Params, carry: Carry, step: jax.Array) -> Carry:
    """Nothing persists beside the parameters."""
    return carry

  def weights(self, params: Params, carry: Carry, *, branch: str) -> Params:
    """The encoder's parameters."""
    return params["encoder"]

  def encode(self, params: Params, carry: Carry, batch: Batch, *, branch: str) -> Features:
    """All patches; tokens leave the class token out, pooled is their mean."""
    del branch  # the only one
    x = self.encoder.apply({"params": params["encoder"]}, self.views.clean(batch["image"]))
    return Features(x[:, 1:], x[:, 1:].mean(1))


def _sets(masks: Masks) -> tuple[TokenSet, TokenSet]:
  """Visible [b k] and hidden [b t] patches."""
  return masks.context, jax.tree.map(lambda x: x[:, 0], masks.targets)


def build(
  run: Run,
  *,
  encoder: Mapping[str, Any],
  decoder: Mapping[str, Any],
  views: Mapping[str, Any],
  mask_ratio: float = 0.75,
  normalize_patches: bool = True,
) -> MAE:
  """MAE for a run.

  Args:
    run: image size, channels, normalisation and compute dtype.
    encoder: arguments of `models.vit.vit`.
    decoder: fields of `models.decoder.PixelDecoder` but `out`.
    views: fields of `data.augment.Augment` but mean and std.
    mask_ratio: share of patches hidden, in (0, 1).
    normalize_patches: standardise each patch of the target.

  Raises:
    ValueError: an unknown key, or a value that can't work.
  """
  network = build_vit(
    run,
    {"init_name": "xavier", **encoder},
    class_token=True,
    registers=0,  # the decoder takes the class token and patches alone
    mask_token=False,
    drop_path=0.0,  # acts in fine-tuning alone
  )
  grid = run.grid(network.patch)
  return MAE(
    encoder=network,
    decoder=construct(
      PixelDecoder,
      decoder,
      where="method.decoder",
      dtype=run.dtype,
      drop_path=0.0,
      out=network.patch**2 * run.channels,
    ),
    masks=Random(tokens=grid[0] * grid[1], ratio=mask_ratio),
    views=construct(Augment, views, where="method.views", mean=run.mean, std=run.std),
    grid=grid,
    normalize_patches=normalize_patches,
  )
