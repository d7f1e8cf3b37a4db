"""Residual networks, v1.5: where a bottleneck halves the map, its 3x3 convolution does.

Source: arXiv 1512.03385; sizes and conventions of torchvision's models.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from jepax.names import one_of
from jepax.sharding import constrain

# name: width, blocks a stage, whether they are bottlenecks
VARIANTS = {
  "resnet18": (512, (2, 2, 2, 2), False),
  "resnet50": (2048, (3, 4, 6, 3), True),
}
STEMS = {"imagenet": 4, "cifar": 1}  # name: stride
MOMENTUM = 0.1  # share of the newest batch in the running statistics: torch's word for it
EPSILON = 1e-5


class BatchNorm(nn.Module, kw_only=True):
  """Normalises channels by the batch in training, and by running statistics ever after.

  Training is where the collection 'batch_stats' may move (`apply(..., mutable=['batch_stats'])`).
  Under jit over a sharded batch its statistics are those of the global batch. As in torch, what
  normalises is the biased variance, and what the running one averages the unbiased.

  zero: start with a scale of 0 instead of 1, so that a residual branch starts silent.
  dtype: of the output; statistics, scale and bias are float32.

  Raises:
    ValueError: training on one value a channel, which has no variance.
  """

  zero: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[b h w c] -> [b h w c]."""
    c, count = x.shape[-1], x.size // x.shape[-1]
    init = nn.initializers.zeros if self.zero else nn.initializers.ones
    scale = self.param("scale", init, (c,))
    bias = self.param("bias", nn.initializers.zeros, (c,))
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,))
    running_var = self.variable("batch_stats", "var", jnp.ones, (c,))
    x = x.astype(jnp.float32)
    if not self.is_mutable_collection("batch_stats"):
      mean, var = running_mean.value, running_var.value
    else:
      mean = x.mean((0, 1, 2))
      var = jnp.square(x - mean).mean((0, 1, 2))
      if not self.is_initializing():
        if count == 1:
          raise ValueError("BatchNorm can't train on one image whose map is one cell")
        running_mean.value += MOMENTUM * (mean - running_mean.value)
        running_var.value += MOMENTUM * (var * count / (count - 1) - running_var.value)
    x = (x - mean) * (jax.lax.rsqrt(var + EPSILON) * scale) + bias
    return x.astype(self.dtype)


def conv(owner: nn.Module, width: int, side: int, *, stride: int = 1, name: str) -> nn.Conv:
  """A convolution without bias to `width` channels in its owner's compute dtype."""
  return nn.Conv(
    width,
    (side, side),
    strides=stride,
    padding=side // 2,
    use_bias=False,
    dtype=owner.dtype,
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    name=name,
  )


class Block(nn.Module, kw_only=True):
  """relu(x + branch(x)); the branch is two 3x3 convolutions or a bottleneck of 1x1, 3x3, 1x1.

  width: channels of the output, four times a bottleneck's inner ones. stride: of the 3x3, the first
  of two. zero_init: the last BatchNorm's scale starts at 0. x is projected where shapes differ.
  """

  width: int
  stride: int
  bottleneck: bool
  zero_init: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[b h w c] -> [b h/stride w/stride width]."""
    x = y = constrain(x)
    layers = [(3, self.stride, self.width), (3, 1, self.width)]  # side, stride, channels
    if self.bottleneck:
      inner = self.width // 4
      layers = [(1, 1, inner), (3, self.stride, inner), (1, 1, self.width)]
    for i, (side, stride, width) in enumerate(layers, 1):
      last = i == len(layers)
      y = conv(self, width, side, stride=stride, name=f"conv{i}")(y)
      y = BatchNorm(zero=self.zero_init and last, dtype=self.dtype, name=f"bn{i}")(y)
      y = y if last else nn.relu(y)
    if x.shape != y.shape:
      x = conv(self, self.width, 1, stride=self.stride, name="conv_skip")(x)
      x = BatchNorm(dtype=self.dtype, name="bn_skip")(x)
    return nn.relu(x + y)


class ResNet(nn.Module, kw_only=True):
  """Images to the cells of the last map, as tokens; a sample's feature is their mean.

  Its statistics are the collection 'batch_stats', see `BatchNorm`.

  width: d, channels of the last map; each stage before has half of the next.
  depths: blocks of each stage. bottleneck: which blocks, see `Block`.
  stem: 'imagenet', 7x7 with stride 2 and max-pooling, or for small images 'cifar', 3x3 alone.
  zero_init: every block starts as its skip (arXiv 1706.02677).
  dtype: of convolutions and activations; parameters and statistics are float32.

  Raises:
    ValueError: an unknown stem, a stage without blocks, or a width that the stages don't divide.
  """

  width: int
  depths: tuple[int, ...]
  bottleneck: bool
  stem: str = "imagenet"
  zero_init: bool = False
  dtype: jnp.dtype = jnp.float32

  class_token = False
  prefix = 0
  position = "none"
  grid = None

  def __post_init__(self):
    one_of(self.stem, STEMS, where="stem")
    check_stages(self.depths, width=self.width, shrink=self._shrink)
    super().__post_init__()

  @property
  def patch(self) -> int:
    """Pixels a side that one cell of the last map stands for."""
    return STEMS[self.stem] * 2 ** (len(self.depths) - 1)

  @property
  def _shrink(self) -> int:
    """Channels of the last map for one of the stem."""
    return (4 if self.bottleneck else 1) * 2 ** (len(self.depths) - 1)

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Encodes images.

    Args:
      images: f32[b h w c], normalised; h and w are multiples of `patch`.

    Returns:
      f32[b n d], the n cells in raster order.

    Raises:
      ValueError: another size.
    """
    check_size(images, patch=self.patch)
    stem, large = self.width // self._shrink, self.stem == "imagenet"
    x = conv(self, stem, 7 if large else 3, stride=2 if large else 1, name="conv")(images)
    x = nn.relu(BatchNorm(dtype=self.dtype, name="bn")(x))
    if large:
      x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for stage, depth in enumerate(self.depths):
      for i in range(depth):
        x = Block(
          width=self.width >> (len(self.depths) - 1 - stage),
          stride=2 if stage and not i else 1,
          bottleneck=self.bottleneck,
          zero_init=self.zero_init,
          dtype=self.dtype,
          name=f"stage{stage}_block{i}",
        )(x)
    return rearrange(x, "b h w d -> b (h w) d").astype(jnp.float32)


def check_stages(depths: tuple[int, ...], *, width: int, shrink: int) -> None:
  """Raises ValueError unless every stage has blocks, and `shrink` divides the width."""
  if not depths or min(depths) < 1:
    raise ValueError(f"depths={depths} must be the blocks of each stage, 1 or more")
  if width < 1 or width % shrink:
    raise ValueError(f"width={width} must be a positive multiple of {shrink}")


def check_size(images: jax.Array, *, patch: int) -> None:
  """Raises ValueError unless the sides of [b h w c] are multiples of `patch`."""
  _, h, w, _ = images.shape
  if h % patch or w % patch or not h * w:
    raise ValueError(
      f"images of {h}x{w} pixels do not divide into cells of {patch}, which this encoder's strides "
      f"make; choose multiples of {patch} for data.size (and sizes of views)"
    )


def resnet(variant: str, **fields) -> ResNet:
  """A ResNet by the name of its size: resnet18 or resnet50.

  Args:
    variant: a key of VARIANTS.
    **fields: any other field of `ResNet`; sizes given here override the variant's.

  Raises:
    ValueError: an unknown variant.
  """
  one_of(variant, VARIANTS, where="variant")
  sizes = dict(zip(("width", "depths", "bottleneck"), VARIANTS[variant], strict=True))
  return ResNet(**{**sizes, **fields})
