"""Heads on pooled features and on tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jepax.losses import normalise
from jepax.models.transformer import dense
from jepax.names import one_of


class Expander(nn.Module):
  """VICReg's expander: (Dense, BatchNorm, ReLU) for each hidden width, then Dense, no bias.

  Under jit over a sharded batch the BatchNorm statistics are those of the global batch.

  widths: hidden and output units, for example (8192, 8192, 8192).
  Source: arXiv 2105.04906 and facebookresearch/vicreg.
  """

  widths: tuple[int, ...]
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """x: [b d] -> f32[b widths[-1]]; `train` uses and updates batch statistics."""
    for i, width in enumerate(self.widths[:-1]):
      x = nn.Dense(width, dtype=self.dtype, name=f"dense{i}")(x)
      norm = nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=jnp.float32, name=f"bn{i}"
      )
      x = nn.relu(norm(x))
    last = nn.Dense(self.widths[-1], use_bias=False, dtype=self.dtype, name="out")
    return last(x).astype(jnp.float32)


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
      x = nn.gelu(dense(self, self.hidden, name=f"dense{i}")(x), approximate=False)
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
