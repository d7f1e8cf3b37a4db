"""Heads on pooled features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn


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
