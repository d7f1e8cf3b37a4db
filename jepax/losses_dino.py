"""The losses of DINOv2 and DINOv3: pure functions of arrays, in float32.

Teacher distributions over K prototypes come from `softmax_centered` or `sinkhorn`; `dino` and
`ibot` compare students with them; `koleo` spreads features; `gram` keeps patches' likenesses.
All take the global batch, so they are the same on any number of devices.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jepax import losses


def softmax_centered(logits: jax.Array, center: jax.Array, *, temperature: float) -> jax.Array:
  """softmax((logits - center) / temperature): [... K], [K] -> f32[... K]."""
  chex.assert_shape(center, logits.shape[-1:])
  return jax.nn.softmax((logits.astype(jnp.float32) - center) / temperature)


def moved_center(
  center: jax.Array, logits: jax.Array, *, valid: jax.Array | None = None, momentum: float = 0.9
) -> jax.Array:
  """The center of the next step: a moving average of the teacher's mean logits.

  Args:
    center: f32[K].
    logits: [... K].
    valid: bool[...], rows that count; None for all. Without any the center stays.
    momentum: what is kept of the center.

  Returns:
    f32[K].
  """
  rows = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32)
  weight = jnp.ones(len(rows)) if valid is None else valid.reshape(-1).astype(jnp.float32)
  mean = weight @ rows / jnp.maximum(weight.sum(), 1)
  moved = momentum * center + (1 - momentum) * mean
  return jnp.where(weight.any(), moved, center)


def sinkhorn(
  logits: jax.Array,
  *,
  temperature: float | jax.Array,
  valid: jax.Array | None = None,
  iterations: int = 3,
) -> jax.Array:
  """Soft assignments that use all prototypes alike over the batch.

  Q = exp(logits / temperature); then, in turns: every prototype's column divided by its sum over
  the rows, every row by its sum over the prototypes. The factors 1 / K and 1 / B of the reference
  cancel. Here in logarithms, so that nothing overflows.

  Args:
    logits: [... K], all but the last axis being rows.
    temperature: above 0.
    valid: bool[...], rows that count; None for all.
    iterations: turns.

  Returns:
    f32[... K]; every row sums to 1. Rows that are not valid are normalised too but move no other.

  Source: arXiv 2006.09882; facebookresearch/dinov2, dinov2/loss/dino_clstoken_loss.py.
  """
  log_q = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32) / temperature  # [r K]
  counts = None if valid is None else valid.reshape(-1, 1)
  for _ in range(iterations):
    column = jax.nn.logsumexp(log_q, axis=0, where=counts)
    log_q -= jnp.where(jnp.isneginf(column), 0.0, column)  # no valid row at all
    log_q = jax.nn.log_softmax(log_q, axis=1)
  return jnp.exp(log_q).reshape(logits.shape)


def cross_entropy(targets: jax.Array, logits: jax.Array, *, temperature: float) -> jax.Array:
  """-sum_k t_k log_softmax(s / temperature)_k: [... K], [... K] -> f32[...]."""
  chex.assert_equal_shape([targets, logits])
  return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)).sum(-1)


def dino(targets: jax.Array, logits: jax.Array, *, temperature: float = 0.1) -> jax.Array:
  """Mean cross-entropy over the pairs of a teacher crop and another crop of the student.

      for t in teacher crops: for s in student crops other than t: mean_b CE(targets[t], logits[s])

  The reference's sum of a global and a local term, each over the number of all pairs, is this.

  Args:
    targets: f32[b t K], the teacher's distributions of its t crops.
    logits: [b s K], the student's, the first t crops being those of the teacher.
    temperature: of the student.

  Returns:
    f32[].

  Raises:
    ValueError: no pair of different crops.

  Source: facebookresearch/dinov2, dinov2/loss/dino_clstoken_loss.py.
  """
  chex.assert_rank([targets, logits], 3)
  b, t, _ = targets.shape
  s = logits.shape[1]
  if s < t or t * s == t:
    raise ValueError(
      f"DINO compares different crops: found {t} of the teacher and {s} of the student; the "
      "student needs those of the teacher and at least two in all"
    )
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
  pairs = -jnp.einsum("btk,bsk->ts", targets, log_p) / b
  return jnp.where(jnp.eye(t, s, dtype=bool), 0.0, pairs).sum() / (t * s - t)


def ibot(
  targets: jax.Array,
  logits: jax.Array,
  valid: jax.Array,
  *,
  crops: int,
  temperature: float = 0.1,
) -> jax.Array:
  """Mean cross-entropy over a crop's hidden patches, summed over crops, divided by `crops`.

  The reference divides by all global crops, also those without a mask: with half of them masked,
  the loss is half the mean over masked crops.

  Args:
    targets: f32[b m k K], the teacher's distributions at the hidden patches of m crops a sample.
    logits: [b m k K], the student's.
    valid: bool[b m k].
    crops: global crops in the batch.
    temperature: of the student.

  Returns:
    f32[].

  Source: facebookresearch/dinov2, dinov2/loss/ibot_patch_loss.py.
  """
  error = cross_entropy(targets, logits, temperature=temperature)
  chex.assert_equal_shape([error, valid])
  return ((error * valid).sum(-1) / jnp.maximum(valid.sum(-1), 1)).sum() / crops


def koleo(x: jax.Array, *, group: int | None = None, epsilon: float = 1e-8) -> jax.Array:
  """-mean_i log(distance of x_i to its nearest neighbour), features on the unit sphere.

      x = x / |x|;  j(i) = argmax_{j != i} x_i . x_j;  -mean_i log(|x_i - x_j(i) + e| + e)

  Two equal rows have distance sqrt(d) * 1e-8 and a gradient to match: don't repeat samples.

  Args:
    x: [b d].
    group: rows searched for neighbours; None for all. The reference searches those of a GPU.
    epsilon: e.

  Returns:
    f32[].

  Raises:
    ValueError: a group of one row, or one that does not divide the batch.

  Source: arXiv 1806.03198; facebookresearch/dinov2, dinov2/loss/koleo_loss.py.
  """
  chex.assert_rank(x, 2)
  group = group or len(x)
  if group < 2 or len(x) % group:
    raise ValueError(
      f"koleo looks for neighbours in groups of {group} of {len(x)} rows: a group needs 2 rows or "
      "more and must divide them"
    )
  x = losses.normalise(x, epsilon=epsilon).reshape(-1, group, x.shape[-1])
  # Full precision: bfloat16 could take the wrong neighbour.
  likeness = jnp.einsum("gid,gjd->gij", x, x, precision=jax.lax.Precision.HIGHEST)
  nearest = jnp.where(jnp.eye(group, dtype=bool), -1.0, likeness).argmax(-1)
  neighbour = jnp.take_along_axis(x, nearest[..., None], axis=1)
  distance = jnp.linalg.norm(x - neighbour + epsilon, axis=-1)
  return -jnp.log(distance + epsilon).mean()


def gram(x: jax.Array, y: jax.Array) -> jax.Array:
  """Mean squared difference of two sets of cosine similarities between an image's patches.

  Args:
    x: [b n d], the student's patches.
    y: [b n e], those of the Gram teacher.

  Returns:
    f32[], mean over images and all n * n pairs.

  Source: arXiv 2508.10104, section 4.
  """
  chex.assert_equal_shape_prefix([x, y], 2)
  return jnp.square(_cosines(x) - _cosines(y)).mean()


def _cosines(x: jax.Array) -> jax.Array:
  x = losses.normalise(x)
  return jnp.einsum("bid,bjd->bij", x, x)
