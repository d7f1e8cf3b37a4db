"""Attention maps: who looks at whom, head by head, and through all layers (rollout)."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jepax.pretrained import Encoder


def attention_maps(encoder: Encoder, images: np.ndarray | jax.Array) -> jax.Array:
  """The attention weights of every layer and head.

  Args:
    encoder: a ViT; its blocks sow queries and keys, so this is exactly what it computed.
    images: u8[b *size channels].

  Returns:
    f32[l b h n n], query by key, rows sum to 1; class token and registers come first, if any.

  Raises:
    ValueError: a convolutional encoder.
  """
  encoder.check_blocks("attention maps")
  return _maps((encoder.module, encoder.preprocess), encoder.params, images)


@functools.partial(jax.jit, static_argnums=0)
def _maps(static, params, images) -> jax.Array:
  module, preprocess = static
  x = preprocess.normalise(images)
  _, sown = module.apply({"params": params}, x, mutable=["intermediates"])
  blocks = sown["intermediates"]["transformer"]
  if module.scan:
    query, key = (blocks["blocks"][name][0] for name in ("query", "key"))
  else:
    order = [blocks[f"block{i}"] for i in range(module.depth)]
    query, key = (jnp.stack([block[name][0] for block in order]) for name in ("query", "key"))
  query, key = query.astype(jnp.float32), key.astype(jnp.float32)  # [l b n h e]
  logits = jnp.einsum("lbnhe,lbmhe->lbhnm", query * query.shape[-1] ** -0.5, key)
  return jax.nn.softmax(logits, axis=-1)


def rollout(maps: jax.Array, *, residual: float = 0.5) -> jax.Array:
  """Attention through all layers, as if the network only averaged tokens.

  Args:
    maps: f32[l b h n n] from `attention_maps`.
    residual: share of a token that the skip connection keeps, in [0, 1].

  Returns:
    f32[b n n]: how much of input token m is in output token n; rows sum to 1.

  Raises:
    ValueError: a share outside [0, 1].

  Source:
    Abnar and Zuidema 2020, arXiv 2005.00928 (residual = 0.5, mean over heads).
  """
  chex.assert_rank(maps, 5)
  if not 0 <= residual <= 1:
    raise ValueError(f"residual must lie in [0, 1], found {residual}")
  mixed = residual * jnp.eye(maps.shape[-1]) + (1 - residual) * maps.mean(2)  # [l b n n]
  return functools.reduce(lambda through, layer: layer @ through, mixed)
