"""Frozen encoders with the preprocessing that belongs to them, from a run or from weights.

encoder = jepax.pretrained.load("runs/quickstart")
features = encoder(images)  # tokens [b n d], pooled [b d]
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from jepax.core import Features, Params
from jepax.data.augment import check_normalisation, normalise
from jepax.data.build import Data
from jepax.data.decode import convert_channels
from jepax.data.transforms import INTERPOLATIONS, CenterCrop, resize
from jepax.models import encoder as encoders
from jepax.models.vit import ViT, sincos2d
from jepax.names import one_of

POOLS = ("mean", "class")
# What an encoder's features can be, see `kinds`.
KINDS = ("pooled", "last4", "class", "spatial", "tokens")
CELLS = 3  # a side, of the partition that 'spatial' features average over


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
  """What happens to an image before an encoder sees it.

  size: (height, width) the encoder gets, pixels.
  resize: shorter side before the middle of `size` is cut out; None to resize straight to `size`,
    whatever the aspect.
  interpolation: 'bilinear', 'bicubic' or another of `data.transforms.INTERPOLATIONS`.
  mean, std: a channel, of pixels in [0, 1]; their number is the number of channels.
  """

  size: tuple[int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  resize: int | None = None
  interpolation: str = "bilinear"

  def __post_init__(self):
    one_of(self.interpolation, INTERPOLATIONS, where="interpolation")
    check_normalisation(self.mean, self.std)
    if self.resize is not None and self.resize < max(self.size):
      raise ValueError(f"resize={self.resize} must be at least the size {self.size}")

  @classmethod
  def of(cls, data: Data) -> Preprocess:
    """What `data` does to its held-out images; nothing to those that have its size already."""
    transform = data.eval_transform or CenterCrop(data.size)
    return cls(
      size=(data.size, data.size),
      resize=round(transform.size * transform.resize),
      interpolation=transform.interpolation,
      mean=data.mean,
      std=data.std,
    )

  def image(self, image: np.ndarray) -> np.ndarray:
    """One image on the host: u8[h w c], any size, c 1 or 3 -> u8[*size channels]."""
    if image.ndim != 3 or image.dtype != np.uint8 or image.shape[-1] not in (1, 3):
      raise ValueError(
        f"an image must be u8[h w c] with c 1 or 3, found {image.dtype}{list(image.shape)}"
      )
    image = convert_channels(image[None], channels=len(self.mean))[0]
    height, width = image.shape[:2]
    if self.resize is None:
      return resize(image, self.size, interpolation=self.interpolation)
    short = min(height, width)
    size = (height * self.resize // short, width * self.resize // short)
    image = resize(image, size, interpolation=self.interpolation)
    top, left = ((n - m) // 2 for n, m in zip(image.shape[:2], self.size, strict=True))
    return image[top : top + self.size[0], left : left + self.size[1]]

  def normalise(self, images: jax.Array) -> jax.Array:
    """On the device: u8[b h w c] -> f32[b h w c]."""
    return normalise(images, mean=self.mean, std=self.std)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Encoder:
  """A frozen image encoder: a function images -> Features.

  module: a ViT, ResNet or ConvNeXt. params: its weights, with its running statistics where it has
  any (`models.encoder`). preprocess: what they were trained with.
  name: which weights these are: 'target', 'online', 'random_init', ...
  pool: 'mean' of the patch tokens (I-JEPA) or the 'class' token (DINOv2).
  origin: where the weights come from, in words.
  """

  module: nn.Module
  params: Params
  preprocess: Preprocess
  name: str
  pool: str = "mean"
  origin: str = ""

  def __post_init__(self):
    one_of(self.pool, POOLS, where="pool")
    if self.pool == "class" and not self.module.class_token:
      raise ValueError("pool='class' needs an encoder with a class token; use pool='mean'")

  @property
  def offered(self) -> tuple[str, ...]:
    """The kinds of features it has: all, but for want of a class token or of equal blocks."""
    lacking = {"class": not self.module.class_token, "last4": not isinstance(self.module, ViT)}
    return tuple(kind for kind in KINDS if kind not in lacking or not lacking[kind])

  def check_blocks(self, what: str) -> None:
    """Raises ValueError where the encoder is no transformer, which `what` takes."""
    if not isinstance(self.module, ViT):
      kind = type(self.module).__name__
      raise ValueError(f"for {what} an encoder needs the blocks of a ViT, and this is a {kind}")

  @property
  def grid(self) -> tuple[int, int]:
    """Patches (rows, columns) of an image."""
    return tuple(n // self.module.patch for n in self.preprocess.size)

  def prepare(self, images: np.ndarray | Sequence[np.ndarray | Image.Image]) -> np.ndarray:
    """Images of any size, u8[h w c] arrays or Pillow's, -> u8[b *size channels]."""
    if isinstance(images, np.ndarray) and images.ndim != 4:
      raise ValueError(
        f"images must be u8[b h w c], found shape {list(images.shape)}; give one image as [image]"
      )
    if not len(images):
      raise ValueError("there are no images to encode")
    return np.stack([self.preprocess.image(_array(image)) for image in images])

  def __call__(self, images: np.ndarray | Sequence[np.ndarray | Image.Image]) -> Features:
    """Encodes images: resize, crop, normalise, encode.

    Args:
      images: u8[b h w c], or a sequence of images of any sizes, arrays or Pillow's.

    Returns:
      tokens f32[b n d] of the patches, without class token and registers; pooled f32[b d].
    """
    return self.features(self.prepare(images))

  def features(self, images: np.ndarray | jax.Array) -> Features:
    """The same of images that have the encoder's size already, u8[b *size channels]."""
    return _features(self._jitted, self.params, self._sized(images))

  def layers(self, images: np.ndarray | jax.Array, *, last: int) -> jax.Array:
    """Outputs of the last `last` blocks, each through the final norm, f32[last b p+n d].

    Class token and registers, `module.prefix` of them, come first.

    Raises:
      ValueError: a convolutional encoder, whose layers have other shapes.
    """
    self.check_blocks("the outputs of its last blocks")
    return _layers(self._jitted, self.params, self._sized(images), last)

  def kinds(self, images: np.ndarray | jax.Array, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """Several kinds of features from one forward pass.

    Args:
      images: u8[b *size channels].
      names: any of 'pooled' [b d], as `features` pools; 'last4' [b 4d], the mean patch of each of
        the last four blocks (of all, in a shallower encoder); 'class' [b d], the class token;
        'spatial' [b 9d], the mean patch of each cell of 3 x 3, in the manner of Goyal et al. 2019
        (arXiv 1905.01235), who keep a coarse map; 'tokens' [b n d], the patches.
    """
    for name in names:
      one_of(name, KINDS, where="kind of features")
      if name not in self.offered:
        raise ValueError(f"this encoder has no {name!r} features; it has {self.offered}")
    return _kinds(self._jitted, self.params, self._sized(images), names)

  def random(self, seed: int = 0) -> Encoder:
    """The same encoder at random initialisation: the control beside every number."""
    image = jnp.zeros((1, *self.preprocess.size, len(self.preprocess.mean)))
    params = jax.jit(encoders.init, static_argnums=0)(self.module, jax.random.key(seed), image)
    if self._has_frozen_table():  # it was never trained, so a fresh network has it too
      params = {**params, "position": self.params["position"]}
    return dataclasses.replace(
      self, params=params, name="random_init", origin=f"random initialisation, seed {seed}"
    )

  def sha256(self) -> str:
    """A hash of all weights, their names and shapes: equal weights, equal hash."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
      array = np.asarray(leaf)
      digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
      digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

  def _sized(self, images: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """The images, or ValueError: another size would pass silently, as positions adapt to it."""
    wanted = (*self.preprocess.size, len(self.preprocess.mean))
    if images.shape[1:] != wanted or images.dtype != np.uint8:
      raise ValueError(
        f"images must be u8[b {' '.join(map(str, wanted))}], found {images.dtype}"
        f"{list(images.shape)}; `prepare` makes them so"
      )
    return images

  def _has_frozen_table(self) -> bool:
    """Whether the positions are a sin-cos table that merely lies among the weights."""
    if self.module.position != "learned":
      return False
    table = np.asarray(self.params["position"])[int(self.module.class_token) :]
    return bool(np.abs(table - sincos2d(self.grid, self.module.width)).max() < 1e-5)

  @property
  def _jitted(self) -> tuple[nn.Module, Preprocess, str]:
    """What the compiled functions depend on beside arrays, hashable."""
    return self.module, self.preprocess, self.pool


def load(
  path: str | Path,
  *,
  branch: str | None = None,
  positions: str | None = None,
  size: int | None = None,
  method: Any = None,
) -> Encoder:
  """An encoder with its preprocessing, from any weights that jepax reads.

  Args:
    path: a run's workdir (its newest checkpoint, or the best one where it stops early; read only),
      a folder of `jepax.convert`, a Hugging Face folder (I-JEPA, ViT-MAE, DINOv2), or Meta's
      I-JEPA `.pth.tar`.
    branch: which of the encoder's sets of weights; by default the one that counts: of I-JEPA the
      'target', where the source has it. `facebook/ijepa_*` on the hub hold the context encoder,
      'online'.
    positions: how positions come to another grid of patches than the weights': 'interpolate' or
      'recompute'.
    size: pixels a side of the images, to change the preprocessing's.
    method: of a run of one's own method, what `jepax.fit.run` was given.

  Raises:
    ValueError: no weights there, weights that don't fit or can't be represented, an unknown
      branch, or another grid without a choice of positions.
  """
  from jepax.convert import source  # loads what only converting needs

  return source.read(path, method=method).at(size=size, positions=positions).encoder(branch)


@functools.partial(jax.jit, static_argnums=0)
def _features(static, params: Params, images) -> Features:
  module, preprocess, pool = static
  x = encoders.apply(module, params, preprocess.normalise(images))
  patches = x[:, module.prefix :]
  return Features(patches, patches.mean(1) if pool == "mean" else x[:, 0])


@functools.partial(jax.jit, static_argnums=(0, 3))
def _layers(static, params: Params, images, last: int) -> jax.Array:
  module, preprocess, _ = static
  return module.apply({"params": params}, preprocess.normalise(images), last=last)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _kinds(static, params: Params, images, names: tuple[str, ...]) -> dict[str, jax.Array]:
  module, preprocess, pool = static
  x = preprocess.normalise(images)
  if isinstance(module, ViT):
    last = min(4, module.depth) if "last4" in names else 1
    layers = module.apply({"params": params}, x, last=last)
  else:
    layers = encoders.apply(module, params, x)[None]
  patches = layers[:, :, module.prefix :]  # [l b n d]
  means = patches.mean(2)
  found = {
    "pooled": means[-1] if pool == "mean" else layers[-1, :, 0],
    "last4": jnp.concatenate(means, -1),
    "class": layers[-1, :, 0],
    "spatial": _cells(patches[-1], images.shape[1] // module.patch),
    "tokens": patches[-1],
  }
  return {name: found[name] for name in names}


def _cells(patches: jax.Array, rows: int) -> jax.Array:
  """Mean patch of each cell, [b n d] -> [b 9d]; where 3 doesn't divide the grid, cells overlap."""
  x = patches.reshape(patches.shape[0], rows, -1, patches.shape[-1])  # [b h w d]

  def edges(n: int) -> list[tuple[int, int]]:
    return [(i * n // CELLS, -(-(i + 1) * n // CELLS)) for i in range(CELLS)]

  cells = [
    x[:, top:bottom, left:right].mean((1, 2))
    for top, bottom in edges(x.shape[1])
    for left, right in edges(x.shape[2])
  ]
  return jnp.concatenate(cells, -1)


def _array(image: Any) -> np.ndarray:
  """A Pillow image or an array as u8[h w c]."""
  if isinstance(image, Image.Image) and image.mode not in ("L", "RGB"):
    image = image.convert("RGB")
  array = np.asarray(image)
  return array[..., None] if array.ndim == 2 else array
