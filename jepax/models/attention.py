"""Multi-head attention behind one switch, the plain form being the reference of the others."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jepax.names import one_of

IMPLEMENTATIONS = ("auto", "plain", "xla", "cudnn")


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  valid: jax.Array | None = None,
  implementation: str = "auto",
) -> jax.Array:
  """softmax(q k^T / sqrt(e)) v over the valid keys; softmax in float32.

  Args:
    q: [b n h e].
    k: [b m h e].
    v: [b m h e].
    valid: bool[b m], keys to attend to; None means all.
    implementation: 'plain' (written out), 'xla' or 'cudnn' (jax.nn.dot_product_attention), or
      'auto': cudnn where it serves (bfloat16 on a GPU, see `_suits_cudnn`), else plain.

  Returns:
    [b n h e], in q's dtype.

  Raises:
    ValueError: an unknown implementation, or cuDNN without a GPU.
  """
  one_of(implementation, IMPLEMENTATIONS, where="attention")
  chex.assert_equal_shape([k, v])
  if implementation == "auto":
    on_gpu = jax.default_backend() == "gpu"
    implementation = "cudnn" if on_gpu and _suits_cudnn(q, k, valid) else "plain"
  if implementation == "cudnn" and jax.default_backend() != "gpu":
    raise ValueError(
      f"attention='cudnn' needs an NVIDIA GPU, found {jax.default_backend()}; use 'auto'"
    )
  if implementation == "plain":
    return _plain(q, k, v, valid)
  mask = None if valid is None else valid[:, None, None, :]
  return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)


def _suits_cudnn(q, k, valid) -> bool:
  """Whether cuDNN's fused kernels take these arrays, in the backward pass too.

  A mask reaches them as a bias, whose gradient needs even numbers of queries and keys.
  """
  even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
  heads_fit = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
  return q.dtype == jnp.bfloat16 and heads_fit and (valid is None or even)


def _plain(q, k, v, valid):
  # Heads before tokens: on CPU the products then run on contiguous matrices, 0.57x the time.
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [b h n e]
  logits = jnp.einsum(
    "bhne,bhme->bhnm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
  )
  if valid is not None:
    logits = jnp.where(valid[:, None, None, :], logits, -1e30)  # finite: a row without keys is 0/0
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum("bhnm,bhme->bhne", weights, v).swapaxes(1, 2)
