"""Linear segmentation: what is at each pixel, read off frozen patch tokens."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jepax.evals import dense
from jepax.evals.batches import in_batches

Array = jax.Array | np.ndarray


@struct.dataclass
class Head:
  """A fitted head. linear: with c classes; losses: f32[steps]; grid: of the patches."""

  linear: dense.Linear
  losses: jax.Array
  grid: dense.Grid = struct.field(pytree_node=False)


def fit(
  tokens: Array,
  maps: Array,
  *,
  grid: dense.Grid,
  num_classes: int,
  ignore: int = 255,
  steps: int = 2000,
  batch_size: int = 16,
  optimizer: str = "adamw",
  learning_rate: float = 1e-3,
  weight_decay: float = 1e-4,
  warmup: int = 100,
  seed: int = 0,
) -> Head:
  """Trains a linear layer on patch tokens, its logits upsampled to the pixels bilinearly.

  Args:
    tokens: f32[n t d], frozen patch tokens in raster order, without class or register tokens.
    maps: integers [n h w] in 0..num_classes - 1, or `ignore`.
    grid: patches (rows, columns), of product t.
    num_classes: at least 2.
    ignore: the label of pixels that count neither here nor in `score`.
    steps, batch_size, optimizer, learning_rate, weight_decay, warmup, seed: see `dense.train`.

  Returns:
    The fitted Head.

  Raises:
    ValueError: shapes that do not match, labels out of range, or an impossible setting.

  Source:
    The linear head of DINOv2 (arXiv 2304.07193, section 7.4; facebookresearch/dinov2,
    dinov2/eval/segmentation): BatchNorm, 1x1 convolution, AdamW at 1e-3 with decay 1e-4 and batches
    of 16, as here. It takes 40,000 steps (1,500 warm-up) with augmented images.
  """
  dense.check(tokens, grid=grid, maps=maps)
  if num_classes < 2:
    raise ValueError(f"num_classes must be at least 2, found {num_classes}")
  linear, losses = dense.train(
    tokens,
    _labels(maps, num_classes=num_classes, ignore=ignore),
    loss=_Loss(grid, ignore),
    outputs=num_classes,
    steps=steps,
    batch_size=batch_size,
    optimizer=optimizer,
    learning_rate=learning_rate,
    weight_decay=weight_decay,
    warmup=warmup,
    seed=seed,
  )
  return Head(linear, losses, grid)


def predict(
  head: Head, tokens: Array, *, size: tuple[int, int], batch_size: int = 16
) -> np.ndarray:
  """The most likely class of each pixel.

  Args:
    head: from `fit`.
    tokens: f32[n t d].
    size: height and width of the maps.
    batch_size: images at a time.

  Returns:
    i32[n h w].
  """
  dense.check(tokens, grid=head.grid)
  dense.check_width(head.linear, tokens)

  def classes(part):
    return _classes(head, part, size=tuple(size))

  return in_batches(classes, tokens, batch_size=min(batch_size, len(tokens)))


def score(
  head: Head, tokens: Array, maps: Array, *, ignore: int = 255, batch_size: int = 16
) -> dict[str, float]:
  """How well the head finds the classes of other images.

  Args:
    head: from `fit`.
    tokens: f32[n t d].
    maps: integers [n h w], as in `fit`.
    ignore: the label of pixels that do not count.
    batch_size: images at a time.

  Returns:
    miou: the intersection over union of a class, over the pixels of all images together, mean
      over the classes that occur in the maps or among the predictions.
    pixel_accuracy: the share of pixels labelled right.

  Raises:
    ValueError: shapes that do not match, labels out of range, or no pixel that counts.
  """
  dense.check(tokens, grid=head.grid, maps=maps)
  num_classes = len(head.linear.bias)
  maps = _labels(maps, num_classes=num_classes, ignore=ignore)
  found = predict(head, tokens, size=maps.shape[1:], batch_size=batch_size)
  table = confusion(maps, found, num_classes=num_classes, ignore=ignore)
  right = np.diag(table)
  union = table.sum(0) + table.sum(1) - right
  seen = union > 0
  return {
    "miou": float((right[seen] / union[seen]).mean()),
    "pixel_accuracy": float(right.sum() / table.sum()),
  }


def confusion(truth: np.ndarray, found: np.ndarray, *, num_classes: int, ignore: int) -> np.ndarray:
  """Counts pixels by their true and their found class, exactly.

  Args:
    truth: integers, in 0..num_classes - 1 or `ignore`.
    found: integers of the same shape, in 0..num_classes - 1.
    num_classes: c.
    ignore: the label in `truth` of pixels left out.

  Returns:
    i64[c c], the true class first.
  """
  kept = truth != ignore
  pairs = truth[kept].astype(np.int64) * num_classes + found[kept]
  return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def cross_entropy(logits: jax.Array, maps: jax.Array, *, ignore: int) -> jax.Array:
  """Mean over the pixels that count; 0 if none does.

  Args:
    logits: f32[b h w c].
    maps: i32[b h w], in 0..c - 1 or `ignore`.
    ignore: the label of pixels left out.

  Returns:
    f32[].
  """
  chex.assert_equal_shape_prefix([logits, maps], 3)
  kept = maps != ignore
  each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(kept, maps, 0))
  return (each * kept).sum() / jnp.maximum(kept.sum(), 1)


@dataclasses.dataclass(frozen=True)
class _Loss:
  grid: dense.Grid
  ignore: int

  def __call__(self, linear, tokens, maps, step):
    del step
    logits = dense.resize(linear(tokens, self.grid), maps.shape[1:])
    return cross_entropy(logits, maps, ignore=self.ignore)


@functools.partial(jax.jit, static_argnames="size")
def _classes(head, tokens, *, size):
  logits = dense.resize(head.linear(tokens, head.grid), size)
  return logits.argmax(-1).astype(jnp.int32)


def _labels(maps: Array, *, num_classes: int, ignore: int) -> np.ndarray:
  maps = np.asarray(maps)
  if not np.issubdtype(maps.dtype, np.integer):
    raise ValueError(f"maps must hold integers, found dtype {maps.dtype}")
  kept = maps[maps != ignore]
  if not kept.size or kept.min() < 0 or kept.max() >= num_classes:
    found = f"{kept.min()}..{kept.max()}" if kept.size else f"no other label than {ignore}"
    raise ValueError(
      f"maps must hold labels in 0..{num_classes - 1} for num_classes={num_classes}, or "
      f"ignore={ignore}; found {found}"
    )
  return maps.astype(np.int32)
