"""The matrix product of linear layers."""

from __future__ import annotations

from typing import Any

import jax

from jepax.sharding import platform


def product(x: jax.Array, kernel: jax.Array, *arguments: Any, **options: Any) -> jax.Array:
  """[... d] x [d e] -> [... e], as `jax.lax.dot_general`, the rest of whose arguments follow.

  What they say of precision a CPU does not heed: it multiplies in the precision of x and kernel.
  """
  if platform() != "cpu":
    return jax.lax.dot_general(x, kernel, *arguments, **options)
  return _product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _product(x, kernel):
  """[n d] x [d e] -> [n e] on a CPU, the kernel's gradient computed as [d e].

  JAX's own gradient is computed as [e d] and turned. One device turns nothing, but with several it
  is turned after it was summed over them, and copied for it: 6 % of ViT-S's step on two.
  """
  return x @ kernel


def _product_forward(x, kernel):
  kept = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
  return x.value @ kernel.value, kept


def _product_backward(kept, g):
  x, kernel = kept  # each kept for the gradient of the other, if that is asked for
  return None if kernel is None else g @ kernel.T, None if x is None else x.T @ g


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)
