"""What the dense heads share: a linear layer on frozen patch tokens, trained in one jitted scan."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

Array = jax.Array | np.ndarray
Grid = tuple[int, int]
OPTIMIZERS = ("adamw", "sgd")


@struct.dataclass
class Linear:
  """A 1x1 convolution on standardised tokens: (tokens - mean) / std @ weight + bias.

  weight: f32[d c]; bias: f32[c]; mean, std: f32[d], of the training tokens.
  """

  weight: jax.Array
  bias: jax.Array
  mean: jax.Array
  std: jax.Array

  def __call__(self, tokens: jax.Array, grid: Grid) -> jax.Array:
    """Logits f32[b rows columns c] of tokens f32[b n d]."""
    x = (tokens - self.mean) / self.std
    logits = jnp.matmul(x, self.weight, precision=jax.lax.Precision.HIGHEST) + self.bias
    return logits.reshape(len(tokens), *grid, -1)


Loss = Callable[[Linear, jax.Array, jax.Array, jax.Array], jax.Array]


def check(tokens: Array, *, grid: Grid, maps: Array | None = None) -> None:
  """Raises ValueError unless tokens are [n t d] with t patches on the grid, and maps [n h w]."""
  rows, columns = grid
  if tokens.ndim != 3 or 0 in tokens.shape or tokens.shape[1] != rows * columns:
    raise ValueError(
      f"tokens must be a non-empty [n t d] with t = {rows * columns} for grid {grid}, found shape "
      f"{tuple(tokens.shape)}; drop class and register tokens first"
    )
  if maps is not None and (maps.ndim != 3 or len(maps) != len(tokens) or 0 in maps.shape):
    raise ValueError(
      f"maps must be [n h w] with n = {len(tokens)}, one an image, found shape {maps.shape}"
    )


def check_width(head: Linear, tokens: Array) -> None:
  """Raises ValueError unless tokens [n t d] have the width the head was fitted on."""
  if tokens.shape[2] != len(head.mean):
    raise ValueError(
      f"tokens have {tokens.shape[2]} features each and the training tokens had "
      f"{len(head.mean)}. Extract both with the same encoder."
    )


def resize(x: jax.Array, size: Grid) -> jax.Array:
  """Bilinear, [b h w ...] to [b size ...], pixel centres at halves (torch: align_corners=False)."""
  shape = (x.shape[0], *size, *x.shape[3:])
  # Without antialiasing, as torch: it would blur where the map is smaller than the grid.
  return jax.image.resize(x, shape, "bilinear", antialias=False)


def train(
  tokens: Array,
  maps: Array,
  *,
  loss: Loss,
  outputs: int,
  steps: int,
  batch_size: int,
  optimizer: str,
  learning_rate: float,
  weight_decay: float,
  warmup: int,
  seed: int,
) -> tuple[Linear, jax.Array]:
  """Fits a Linear to a loss by minibatches, each epoch in a new order.

  The layer standardises by the training tokens' mean and standard deviation, which is what a
  BatchNorm before it would tend to, without running statistics that lag or that a batch moves;
  the scale and offset that BatchNorm learns are the layer's own. All of the tokens are kept on the
  device.

  Args:
    tokens: f32[n t d].
    maps: [n h w].
    loss: (layer, tokens f32[b t d], maps [b h w], step i32[]) -> f32[]. Hashed for the compilation
      cache, so one that compares equal by value compiles once.
    outputs: c of the layer.
    steps, batch_size: of the training; batches of all n where n is smaller.
    optimizer: 'adamw' (betas 0.9, 0.999) or 'sgd' (momentum 0.9).
    learning_rate: reached after `warmup` steps, falling linearly to 0 at the end.
    weight_decay: of the weight, not the bias.
    warmup: steps, fewer than `steps`.
    seed: of the first weights and the order.

  Returns:
    The layer, and the loss of each step, f32[steps].

  Raises:
    ValueError: an unknown optimizer or a setting out of range.
  """
  if optimizer not in OPTIMIZERS:
    raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, found {optimizer!r}")
  if min(steps, batch_size) < 1 or learning_rate <= 0 or weight_decay < 0:
    raise ValueError(
      "steps and batch_size must be at least 1, learning_rate above 0 and weight_decay not below, "
      f"found {steps}, {batch_size}, {learning_rate} and {weight_decay}"
    )
  if not 0 <= warmup < steps:
    raise ValueError(f"warmup must lie in 0..{steps - 1}, below steps={steps}, found {warmup}")
  count, _, width = tokens.shape
  rng = np.random.default_rng(seed)
  weight = rng.normal(scale=0.01, size=(width, outputs)).astype(np.float32)
  order = _order(rng, count, steps=steps, batch_size=min(batch_size, count))
  tokens = jnp.asarray(tokens, jnp.float32)
  rate = {"learning_rate": learning_rate, "weight_decay": weight_decay, "warmup": warmup}
  return _train(weight, tokens, maps, order, rate, loss=loss, optimizer=optimizer)


def _order(rng: np.random.Generator, count: int, *, steps: int, batch_size: int) -> np.ndarray:
  """Rows of each batch, i32[steps b]: every epoch a permutation, its incomplete batch left out."""
  a_pass = count // batch_size
  passes = -(-steps // a_pass)
  rows = [rng.permutation(count)[: a_pass * batch_size] for _ in range(passes)]
  return np.stack(rows).reshape(-1, batch_size)[:steps].astype(np.int32)


@functools.partial(jax.jit, static_argnames=("loss", "optimizer"))
def _train(weight, tokens, maps, order, rate, *, loss, optimizer):
  mean, std = tokens.mean((0, 1)), tokens.std((0, 1))
  # Rounding gives a constant feature a tiny spread; dividing by it would blow up noise.
  std = jnp.where(std > 1e-6 * jnp.abs(mean), std, 1.0)
  tx = _optimizer(optimizer, len(order), **rate)

  def value(params, rows, step):
    return loss(Linear(*params, mean, std), tokens[rows], maps[rows], step)

  def update(carry, x):
    params, state = carry
    rows, step = x
    found, grads = jax.value_and_grad(value)(params, rows, step)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), found

  params = weight, jnp.zeros(weight.shape[1])
  xs = order, jnp.arange(len(order))
  (params, _), losses = jax.lax.scan(update, (params, tx.init(params)), xs)
  return Linear(*params, mean, std), losses


def _optimizer(name, steps, *, learning_rate, weight_decay, warmup):
  def schedule(step):
    rise = jnp.where(step < warmup, (step + 1) / jnp.maximum(warmup, 1), 1.0)
    return learning_rate * rise * (1 - step / steps)

  decay = optax.add_decayed_weights(weight_decay, mask=(True, False))
  scale = optax.scale_by_learning_rate(schedule)
  if name == "adamw":
    return optax.chain(optax.scale_by_adam(), decay, scale)
  return optax.chain(decay, optax.trace(0.9), scale)
