"""Heads on pooled features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

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
    """x: [b d] -> f32[b d], by the mean and the biased variance of the batch."""
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
    for i, width in enumerate(self.widths[:-1]):
      x = nn.Dense(width, use_bias=self.bias, dtype=self.dtype, name=f"dense{i}")(x)
      x = nn.relu(BatchNorm(name=f"bn{i}")(x))
    last = nn.Dense(self.widths[-1], use_bias=self.out_bias, dtype=self.dtype, name="out")
    x = last(x).astype(jnp.float32)
    if self.out_norm == "none":
      return x
    return BatchNorm(affine=self.out_norm == "affine", name="out_bn")(x)
