"""Heads on pooled features and on tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from jepax.losses import normalise
from jepax.models.activations import gelu
from jepax.models.product import product
from jepax.models.transformer import dense
from jepax.names import one_of

OUT_NORMS = ("none", "plain", "affine")


class BatchNorm(nn.Module):
  """Normalises features over the batch it is given, in training and ever after.

  Heads never see a batch in evaluation, so no running statistics are kept. Under jit over a sharded
  batch the statistics are those of the global batch.

  affine: learn a scale and a shift.
  """

  affine: bool = True
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [b d] -> f32[b d], by the mean and the biased variance of the batch, of 2 rows or more."""
    if len(x) < 2:
      raise ValueError("the BatchNorm of a head can't train on one sample; raise batch_size")
    x = x.astype(jnp.float32)
    x = x - x.mean(0)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(0) + self.epsilon)
    if not self.affine:
      return x
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    return x * scale + self.param("bias", nn.initializers.zeros, x.shape[-1:])


class MLP(nn.Module):
  """(Dense, BatchNorm, ReLU) for each hidden width, then Dense and `out_norm`.

  The projectors and predictors of the methods with two views; they differ in widths and biases.

  widths: hidden and output units, for example (8192, 8192, 8192).
  bias: of the hidden Dense layers. out_bias: of the last.
  out_norm: of the output, 'none', 'plain' (BatchNorm without scale and shift) or 'affine'.
  """

  widths: tuple[int, ...]
  bias: bool = True
  out_bias: bool = False
  out_norm: str = "none"
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    one_of(self.out_norm, OUT_NORMS, where="out_norm")
    if not self.widths or min(self.widths) < 1:
      raise ValueError(f"widths must be one or more numbers of at least 1, found {self.widths}")
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [b d] -> f32[b widths[-1]]."""
    layer = functools.partial(nn.Dense, dtype=self.dtype, dot_general=product)
    for i, width in enumerate(self.widths[:-1]):
      x = layer(width, use_bias=self.bias, name=f"dense{i}")(x)
      x = nn.relu(BatchNorm(name=f"bn{i}")(x))
    last = layer(self.widths[-1], use_bias=self.out_bias, name="out")
    x = last(x).astype(jnp.float32)
    if self.out_norm == "none":
      return x
    return BatchNorm(affine=self.out_norm == "affine", name="out_bn")(x)


class DinoHead(nn.Module, kw_only=True):
  """DINO's head: an MLP to a narrow unit vector, then its likeness to many prototypes.

  prototypes: K, outputs. hidden, bottleneck: widths; layers: of the MLP, the bottleneck's included.
  last: the layer onto the prototypes, never with a bias: 'weight_norm', unit prototypes times a
    learned gain each that starts at 1 (DINOv2); 'unit', without gain (DINO's norm_last_layer);
    'linear', plain (DINOv3).
  dtype: of matrix products; the unit vector and the outputs are float32.

  Raises:
    ValueError: a size below 1, or an unknown `last`.

  Source: arXiv 2104.14294 and 2304.07193; facebookresearch/dinov2, dinov2/layers/dino_head.py.
  """

  prototypes: int = 65536
  hidden: int = 2048
  bottleneck: int = 256
  layers: int = 3
  last: str = "weight_norm"
  init_name: str = "normal"
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    one_of(self.last, ("weight_norm", "unit", "linear"), where="last")
    for name in ("prototypes", "hidden", "bottleneck", "layers"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [... d] -> logits f32[... K]."""
    for i in range(self.layers - 1):
      x = gelu(dense(self, self.hidden, name=f"dense{i}")(x))
    x = normalise(dense(self, self.bottleneck, name="narrow")(x))
    return Prototypes(count=self.prototypes, kind=self.last, dtype=self.dtype, name="prototypes")(x)


class Prototypes(nn.Module, kw_only=True):
  """The last layer of a `DinoHead`: [... e] -> f32[... count]; kind as its `last`."""

  count: int
  kind: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.count))
    if self.kind != "linear":
      kernel = normalise(kernel.T).T
    if self.kind == "weight_norm":
      kernel = kernel * self.param("gain", nn.initializers.ones, (self.count,))
    return (x.astype(self.dtype) @ kernel.astype(self.dtype)).astype(jnp.float32)
