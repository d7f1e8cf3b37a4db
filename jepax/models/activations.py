"""Activations by the names that configs use."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """x times the normal distribution function at x, exactly.

  `jax.nn.gelu(approximate=False)` takes erfc, for which a CPU needs four times as long as for erf.
  Computed in float32; of the forward pass the backward one keeps x alone, in its own dtype.
  """
  return (x * _cdf(x)).astype(x.dtype)


def _cdf(x: jax.Array) -> jax.Array:
  return 0.5 + 0.5 * jax.lax.erf(x.astype(jnp.float32) * math.sqrt(0.5))


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return gelu(x), x


def _gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
  x = jax.lax.optimization_barrier(x)  # or XLA would find the same erf twice, and keep it for both
  wide = x.astype(jnp.float32)
  density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
  return ((g * (_cdf(x) + wide * density)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)

ACTIVATIONS: dict[str, Callable[..., jax.Array]] = {
  "gelu": gelu,
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
  "relu": nn.relu,
  "swiglu": lambda gate, x: nn.silu(gate) * x,
}
