"""Multi-head attention behind one switch, the plain form being the reference of the others."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp

from jepax.names import one_of
from jepax.sharding import constrain, platform

IMPLEMENTATIONS = ("auto", "plain", "xla", "cudnn")

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


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
      'auto': cudnn where it serves (bfloat16 on a GPU, even counts, see `fused`), else plain.

  Returns:
    [b n h e], in q's dtype.

  Raises:
    ValueError: an unknown implementation, or cuDNN without a GPU.
  """
  one_of(implementation, IMPLEMENTATIONS, where="attention")
  chex.assert_equal_shape([k, v])
  if implementation == "auto":
    serves = fused(implementation, dtype=q.dtype, head_width=q.shape[-1])
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    implementation = "cudnn" if serves and even else "plain"
  if implementation == "cudnn" and platform() != "gpu":
    raise ValueError(f"attention='cudnn' needs an NVIDIA GPU, found {platform()}; use 'auto'")
  if implementation == "plain":
    return _plain(q, k, v, valid).reshape(q.shape)
  mask = None if valid is None else valid[:, None, None, :]
  if mask is not None and implementation == "cudnn":  # which takes no row that stands for all
    mask = constrain(jnp.broadcast_to(mask, (mask.shape[0], 1, q.shape[1], k.shape[1])))
  return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)


def fused(implementation: str, *, dtype: jnp.dtype, head_width: int) -> bool:
  """Whether `attention` runs cuDNN's fused kernels where the counts of queries and keys are even.

  Odd counts they refuse wherever gradients are taken (jax 0.10 to 0.12).

  Args:
    implementation: as of `attention`.
    dtype: of q, k and v. head_width: e.
  """
  heads_fit = head_width % 8 == 0 and head_width <= 128
  serves = platform() == "gpu" and dtype == jnp.bfloat16 and heads_fit
  return implementation == "cudnn" or (implementation == "auto" and serves)


@jax.custom_vjp
def _plain(q, k, v, valid):
  """[b n (h e)], the heads side by side: as the layer behind keeps it, so that both keep one."""
  return _plain_forward(q, k, v, valid)[0]


def _plain_forward(q, k, v, valid):
  b, n, h, e = q.shape
  # Heads before tokens: on CPU the products then run on contiguous matrices, 0.57x the time.
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [b h n e]
  q = q * q.shape[-1] ** -0.5
  logits = _einsum("bhne,bhme->bhnm", q, k)
  if valid is not None:
    logits = jnp.where(valid[:, None, None, :], logits, -1e30)  # finite: a row without keys is 0/0
  weights = jnp.exp(logits - logits.max(-1, keepdims=True))
  # Divided by their sum when they are summed up: the largest array is passed over once less.
  factor = 1 / weights.sum(-1, keepdims=True)
  weights = weights.astype(v.dtype)
  y = (_einsum("bhnm,bhme->bhne", weights, v) * factor).astype(v.dtype)
  y = y.swapaxes(1, 2).reshape(b, n, h * e)
  return y, (q, k, v, weights, factor, y)


def _plain_backward(kept, g):
  q, k, v, weights, factor, y = kept
  b, h, n, e = q.shape
  # Of a softmax's gradient, over e instead of over m; [b h n 1], float32.
  inner = (g.astype(jnp.float32) * y).reshape(b, n, h, e).sum(-1).swapaxes(1, 2)[..., None] * factor
  g = (g.reshape(b, n, h, e).swapaxes(1, 2) * factor).astype(v.dtype)
  g_logits = (weights * (_einsum("bhne,bhme->bhnm", g, v) - inner)).astype(q.dtype)
  g_q = _einsum("bhnm,bhme->bhne", g_logits, k) * q.shape[-1] ** -0.5
  g_k = _einsum("bhnm,bhne->bhme", g_logits, q)
  g_v = _einsum("bhnm,bhne->bhme", weights, g)
  return *(x.swapaxes(1, 2).astype(q.dtype) for x in (g_q, g_k, g_v)), None


_plain.defvjp(_plain_forward, _plain_backward)
