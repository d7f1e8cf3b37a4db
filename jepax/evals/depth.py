"""Linear depth: how far each pixel is, read off frozen patch tokens."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jepax.evals import dense
from jepax.evals.batches import in_batches

Array = jax.Array | np.ndarray
UPSAMPLE = 4  # of the grid of bins, before depths are taken
FLOOR = 1e-3  # added to depths before the logarithm


@struct.dataclass
class Head:
  """A fitted head.

  linear: with c bins; losses: f32[steps]; median: f32[], of the training depths, what a constant
  predictor says; grid: of the patches; low, high: the depths of the first and the last bin.
  """

  linear: dense.Linear
  losses: jax.Array
  median: jax.Array
  grid: dense.Grid = struct.field(pytree_node=False)
  low: float = struct.field(pytree_node=False)
  high: float = struct.field(pytree_node=False)


def fit(
  tokens: Array,
  maps: Array,
  *,
  grid: dense.Grid,
  low: float = 1e-3,
  high: float = 10.0,
  bins: int = 256,
  gradient_weight: float = 0.0,
  mean_steps: int = 100,
  steps: int = 2000,
  batch_size: int = 16,
  optimizer: str = "adamw",
  learning_rate: float = 1e-3,
  weight_decay: float = 1e-2,
  warmup: int = 100,
  seed: int = 0,
) -> Head:
  """Trains a linear layer from patch tokens to weights of bins, whose mean is the depth.

  Args:
    tokens: f32[n t d], frozen patch tokens in raster order, each with the class token or not.
    maps: f32[n h w], depths; those outside low..high and nan are unknown and do not count.
    grid: patches (rows, columns), of product t.
    low, high: depths of the first and last bin, 0 < low < high; 10 for indoor scenes, 80 for roads.
    bins: number of bins, evenly spaced, at least 2.
    gradient_weight: of `gradient_loss`, at least 0.
    mean_steps: first steps, during which the spread of errors is left out of `sig_loss`.
    steps, batch_size, optimizer, learning_rate, weight_decay, warmup, seed: see `dense.train`.

  Returns:
    The fitted Head.

  Raises:
    ValueError: shapes that do not match, no known depth, or an impossible setting.

  Source:
    DINOv2's linear head (arXiv 2304.07193, section 7.4; dinov2/eval/depth): decay 1e-2 as here,
    but 38,400 steps at 1e-4 and augmented images. Its gradient loss, of weight 0.5, differences the
    batch axis in place of rows and is 0 for batches of two, hence the default.
  """
  dense.check(tokens, grid=grid, maps=maps)
  loss = _Loss(grid, low, high, gradient_weight, mean_steps)
  _check_settings(loss, bins)
  maps = np.asarray(maps, np.float32)
  median = np.median(maps[_known(maps, low, high)])
  linear, losses = dense.train(
    tokens,
    maps,
    loss=loss,
    outputs=bins,
    steps=steps,
    batch_size=batch_size,
    optimizer=optimizer,
    learning_rate=learning_rate,
    weight_decay=weight_decay,
    warmup=warmup,
    seed=seed,
  )
  return Head(linear, losses, jnp.asarray(median), grid, low, high)


def predict(
  head: Head, tokens: Array, *, size: tuple[int, int], batch_size: int = 16
) -> np.ndarray:
  """The depth of each pixel.

  Args:
    head: from `fit`.
    tokens: f32[n t d].
    size: height and width of the maps.
    batch_size: images at a time.

  Returns:
    f32[n h w] in head.low..head.high.
  """
  dense.check(tokens, grid=head.grid)
  dense.check_width(head.linear, tokens)

  def depths(part):
    return _depths(head, part, size=tuple(size))

  return in_batches(depths, tokens, batch_size=min(batch_size, len(tokens)))


def score(head: Head, tokens: Array, maps: Array, *, batch_size: int = 16) -> dict[str, float]:
  """How well the head finds the depths of other images, and a constant does.

  Args:
    head: from `fit`.
    tokens: f32[n t d].
    maps: f32[n h w]; as in `fit`, depths outside low..high do not count.
    batch_size: images at a time.

  Returns:
    rmse: root mean squared error, in the unit of depth.
    abs_rel: mean of |found - true| / true.
    delta1: the share of pixels where the larger of found / true and true / found is under 1.25.
    median_rmse, median_abs_rel, median_delta1: the same of a predictor that always says the
      median of the training depths.
    Each is computed within an image and averaged over the images with known depths.

  Raises:
    ValueError: shapes that do not match, or no known depth.
  """
  dense.check(tokens, grid=head.grid, maps=maps)
  maps = np.asarray(maps, np.float64)
  known = _known(maps, head.low, head.high)
  found = predict(head, tokens, size=maps.shape[1:], batch_size=batch_size)
  constant = np.full_like(maps, head.median)
  beside = {f"median_{name}": value for name, value in _errors(constant, maps, known).items()}
  return _errors(found, maps, known) | beside


def expected(logits: jax.Array, *, low: float, high: float) -> jax.Array:
  """The mean depth of evenly spaced bins weighted by relu(logits) + 0.1.

  Args:
    logits: f32[... c].
    low, high: depths of the first and the last bin.

  Returns:
    f32[...].

  Source:
    DINOv2's linear depth head, after AdaBins (arXiv 2011.14141).
  """
  weight = jax.nn.relu(logits) + 0.1
  bins = jnp.linspace(low, high, logits.shape[-1])
  return (weight * bins).sum(-1) / weight.sum(-1)


def sig_loss(error: jax.Array, known: jax.Array, *, mean_only: jax.Array | bool) -> jax.Array:
  """sqrt(var + 0.15 mean^2) of errors of the logarithm of depth, over all known pixels.

  Args:
    error: f32[b h w], ln(found + 0.001) - ln(true + 0.001).
    known: bool[b h w]; elsewhere the error is not read.
    mean_only: leave the variance (unbiased) out.

  Returns:
    f32[].

  Source:
    DINOv2's SigLoss, after Eigen et al. 2014 (arXiv 1406.2283) and AdaBins.
  """
  chex.assert_equal_shape([error, known])
  count = known.sum()
  error = jnp.where(known, error, 0)
  mean = error.sum() / jnp.maximum(count, 1)
  variance = jnp.square((error - mean) * known).sum() / jnp.maximum(count - 1, 1)
  spread = jnp.where(mean_only, 0, variance) + 0.15 * mean**2
  # The root of 0 has no gradient; batches without a known pixel and perfect ones meet it.
  return jnp.where(spread > 0, jnp.sqrt(jnp.where(spread > 0, spread, 1)), 0)


def gradient_loss(error: jax.Array, known: jax.Array) -> jax.Array:
  """How much errors of the logarithm of depth differ two pixels apart, at four scales.

  Args:
    error: f32[b h w], as in `sig_loss`.
    known: bool[b h w]; elsewhere the error is not read.

  Returns:
    f32[], sums of |differences| along rows and columns over known pairs, divided by the known
    pixels, added up over every pixel, every 2nd, 4th and 6th.

  Source:
    MegaDepth (Li and Snavely 2018, arXiv 1804.00607), with the strides of DINOv2's GradientLoss.
  """
  chex.assert_equal_shape([error, known])
  total = jnp.zeros(())
  for stride in (1, 2, 4, 6):
    e, k = error[:, ::stride, ::stride], known[:, ::stride, ::stride]
    e = jnp.where(k, e, 0)
    rows = jnp.abs(e[:, 2:] - e[:, :-2]) * (k[:, 2:] & k[:, :-2])
    columns = jnp.abs(e[:, :, 2:] - e[:, :, :-2]) * (k[:, :, 2:] & k[:, :, :-2])
    total += (rows.sum() + columns.sum()) / jnp.maximum(k.sum(), 1)
  return total


@dataclasses.dataclass(frozen=True)
class _Loss:
  grid: dense.Grid
  low: float
  high: float
  gradient_weight: float
  mean_steps: int

  def __call__(self, linear, tokens, maps, step):
    size = maps.shape[1:]
    found = _to_depth(linear(tokens, self.grid), size=size, low=self.low, high=self.high)
    known = (maps >= self.low) & (maps <= self.high)
    error = jnp.log(found + FLOOR) - jnp.log(jnp.where(known, maps, 1.0) + FLOOR)
    loss = sig_loss(error, known, mean_only=step < self.mean_steps)
    if self.gradient_weight:
      loss += self.gradient_weight * gradient_loss(error, known)
    return loss


def _check_settings(loss: _Loss, bins: int) -> None:
  if not 0 < loss.low < loss.high or bins < 2 or min(loss.gradient_weight, loss.mean_steps) < 0:
    raise ValueError(
      "depth needs 0 < low < high, 2 bins or more, and gradient_weight and mean_steps not below "
      f"0, found bins={bins} and {loss}"
    )


def _to_depth(logits, *, size, low, high):
  """f32[b rows columns c] -> f32[b h w]."""
  _, rows, columns, _ = logits.shape
  logits = dense.resize(logits, (UPSAMPLE * rows, UPSAMPLE * columns))
  return dense.resize(expected(logits, low=low, high=high), size)


@functools.partial(jax.jit, static_argnames="size")
def _depths(head, tokens, *, size):
  return _to_depth(head.linear(tokens, head.grid), size=size, low=head.low, high=head.high)


def _known(maps: np.ndarray, low: float, high: float) -> np.ndarray:
  """bool[n h w]: where a depth is known; raises ValueError when that is nowhere."""
  known = (maps >= low) & (maps <= high)
  if not known.any():
    raise ValueError(f"maps hold no depth in {low:g}..{high:g}; is the unit right?")
  return known


def _errors(found: np.ndarray, true: np.ndarray, known: np.ndarray) -> dict[str, float]:
  """Errors within each image, averaged over the images with known pixels."""
  has = known.any((1, 2))
  found, true, known = found[has], true[has], known[has]
  true = np.where(known, true, 1.0)

  def mean(x):  # [n h w] -> [n]
    return x.mean((1, 2), where=known)

  ratio = np.maximum(found / true, true / found)
  return {
    "rmse": float(np.sqrt(mean(np.square(found - true))).mean()),
    "abs_rel": float(mean(np.abs(found - true) / true).mean()),
    "delta1": float(mean(ratio < 1.25).mean()),
  }
