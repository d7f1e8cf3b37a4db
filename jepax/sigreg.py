"""SIGReg: how far embeddings are from an isotropic Gaussian, seen along random directions.

  for each direction a and node t:   c = mean_n cos(t x_n.a),  s = mean_n sin(t x_n.a)
  statistic of a = b * integral of [(c - e^{-t^2/2})^2 + s^2] e^{-t^2/2} dt over [-t_max, t_max]

by the trapezoid rule, half of whose nodes are spared since the integrand is even. Exact Gaussians
cost 1.0525 on average and never 0; a collapsed batch of b costs 0.40205 b (t_max 3, 17 nodes).

Source: arXiv 2511.08544 and the package `lejepa` eddffdd; its Algorithm 1, 17 nodes on the whole of
[-5, 5], is t_max=5, nodes=9 here.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jepax.losses import matmul


def draw_directions(key: jax.Array, *, width: int, count: int) -> jax.Array:
  """Random unit vectors as columns, f32[width count]; a new key at every step, or they overfit."""
  normal = jax.random.normal(key, (width, count))
  return normal / jnp.linalg.norm(normal, axis=0)


def epps_pulley(
  x: jax.Array,
  *,
  t_max: float = 3.0,
  nodes: int = 17,
  times_samples: bool = True,
  valid: jax.Array | None = None,
) -> jax.Array:
  """The Epps-Pulley statistic of normality with mean 0 and variance 1, of each column.

  Nodes are taken one after another and again in the backward pass, so that memory holds one
  cosine of x rather than one a node.

  Args:
    x: f32[... b m], the global batch projected on m directions.
    t_max: largest node.
    nodes: from 0 to t_max, equally spaced, at least 2.
    times_samples: times b, as in the paper, so that it grows with the batch; else not.
    valid: bool[b], rows that count; None for all.

  Returns:
    f32[... m].
  """
  if nodes < 2 or not t_max > 0:
    raise ValueError(f"nodes must be at least 2 and t_max above 0, found {nodes}, {t_max}")
  chex.assert_type(x, jnp.float32)  # phases of 15 radians have no meaning in bfloat16
  t = jnp.linspace(0.0, t_max, nodes)
  gaussian = jnp.exp(-0.5 * t**2)
  weight = gaussian * (2 * t_max / (nodes - 1)) * jnp.ones(nodes).at[jnp.array([0, -1])].set(0.5)
  rows = jnp.ones(x.shape[-2]) if valid is None else valid.astype(jnp.float32)
  count = jnp.maximum(rows.sum(), 1)

  @jax.checkpoint
  def distance(t, gaussian):
    c, s = (jnp.einsum("...bm,b->...m", wave(t * x), rows) / count for wave in (jnp.cos, jnp.sin))
    return jnp.square(c - gaussian) + jnp.square(s)

  def add(total, node):
    t, gaussian, weight = node
    return total + weight * distance(t, gaussian), None

  zero = jnp.zeros((*x.shape[:-2], x.shape[-1]))
  total, _ = jax.lax.scan(add, zero, (t, gaussian, weight))
  return total * count if times_samples else total


def sigreg(
  x: jax.Array, directions: jax.Array, *, reduction: str = "mean", **settings
) -> jax.Array:
  """The statistic of embeddings over directions and leading axes (views, times).

  Args:
    x: [... b d], the global batch.
    directions: f32[d m], from `draw_directions`.
    reduction: over directions, 'mean' or 'sum'; leading axes are always averaged.
    **settings: of `epps_pulley`.

  Returns:
    f32[].
  """
  if reduction not in ("mean", "sum"):
    raise ValueError(f"reduction must be 'mean' or 'sum', found {reduction!r}")
  statistic = epps_pulley(matmul(x.astype(jnp.float32), directions), **settings)
  return statistic.mean() * (directions.shape[1] if reduction == "sum" else 1)
