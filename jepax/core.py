"""The contract every method keeps, and the one training step they all share.

Read this file first. A method is a frozen dataclass with a few pure functions (`Method`).
`make_train_step` turns any of them into one jitted function:

    batch -> method.loss -> gradients -> optax -> method.update (EMA, centers, queues) -> metrics

What optax moves is `params`, all else that persists is `carry`: only the method knows its content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from jepax.sharding import platform

Params = Any
Carry = Any
Batch = dict[str, jax.Array]  # image u8[b h w c], video u8[b t h w c], label i32[b], ...
Metrics = dict[str, jax.Array]  # 'group/name' -> f32[]


@struct.dataclass
class LossOut:
  """What a loss returns beside its value: the state it moved and what it saw.

  each: f32[b], the loss of each sample, whose mean is the value, for the loss on held-out images;
    None where samples are coupled, or it is not known.
  """

  carry: Carry
  metrics: Metrics
  each: jax.Array | None = None


@struct.dataclass
class Features:
  """Frozen features: tokens f32[b n d] and one pooled vector a sample, f32[b d]."""

  tokens: jax.Array
  pooled: jax.Array


@struct.dataclass
class Reconstruction:
  """What a method that predicts pixels makes of images: `reconstruct(params, carry, batch, key)`.

  pixels: f32[b h w c] in [0, 1], the images with their hidden patches predicted.
  is_masked: bool[b n], the hidden patches, in raster order.
  """

  pixels: jax.Array
  is_masked: jax.Array


@struct.dataclass
class TrainState:
  """All that training persists; arrays only, so it shards, donates and saves as one tree.

  step: i32[] updates tried; key: u32[2], raw, constant (randomness folds in the step);
  skipped: i32[2], updates skipped as not finite, in a row and in all.
  """

  step: jax.Array
  params: Params
  carry: Carry
  opt_state: optax.OptState
  key: jax.Array
  skipped: jax.Array


class Method(Protocol):
  """A frozen dataclass of modules, samplers and numbers with a few pure functions.

  encoder: whose features count; branches: its sets of weights, the first evaluated first; pool:
  'mean' or 'class' token; couples_batch: what couples samples, 'statistics', 'negatives' or ''.
  """

  encoder: Any
  branches: tuple[str, ...]
  pool: str
  couples_batch: str

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Carry]: ...

  def loss(
    self, params: Params, carry: Carry, batch: Batch, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, LossOut]: ...

  def update(self, params: Params, carry: Carry, step: jax.Array) -> Carry: ...

  def weights(self, params: Params, carry: Carry, *, branch: str) -> Params: ...

  def encode(self, params: Params, carry: Carry, batch: Batch, *, branch: str) -> Features: ...


def sample_keys(key: jax.Array, batch: Batch, *, count: int) -> jax.Array:
  """One key a sample, [b], the same on any number of devices and any split into micro-batches.

  Args:
    key: the step's key for one purpose.
    batch: may carry `sample` i32[b], each row's index in the global batch.
    count: b, used to number the rows when `sample` is absent.
  """
  index = batch["sample"] if "sample" in batch else jnp.arange(count)
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def ema(old: Params, new: Params, momentum: jax.Array | float) -> Params:
  """momentum * old + (1 - momentum) * new, leaf by leaf, in float32 (bfloat16 would stall)."""
  return jax.tree.map(lambda o, n: o + (1 - momentum) * (n.astype(o.dtype) - o), old, new)


def norms(tree: Params) -> dict[str, jax.Array]:
  """L2 norms, f32[]: of each part ('encoder', 'predictor', ...) and, as 'train', of all."""
  parts = tree if isinstance(tree, Mapping) else {}
  found = {part: optax.tree.norm(leaves) for part, leaves in parts.items()}
  whole = optax.tree.norm(found if found else tree)
  return {part: norm.astype(jnp.float32) for part, norm in {**found, "train": whole}.items()}


def init_state(
  method: Method, tx: optax.GradientTransformation, key: jax.Array, batch: Batch
) -> TrainState:
  """Builds the state of step 0. Traceable: run it under jit with out_shardings, or eval_shape.

  Args:
    method, tx, key: the method, the optimizer (see `jepax.optim`), a typed PRNG key.
    batch: one batch; only shapes and dtypes matter.
  """
  init_key, run_key = jax.random.split(key)
  params, carry = method.init(init_key, batch)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    carry=carry,
    opt_state=tx.init(params),
    key=jax.random.key_data(run_key),
    skipped=jnp.zeros((2,), jnp.int32),
  )


def make_train_step(
  method: Method, tx: optax.GradientTransformation, *, accumulate: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The training step: a pure function (state, batch) -> (state, metrics), ready for jax.jit.

  An update whose loss or gradient is not finite changes nothing but the counters.

  Args:
    method, tx: those that `init_state` was given.
    accumulate: micro-batches a step; gradients are averaged, `update` runs once.

  Raises:
    ValueError: accumulation over a method whose loss couples the batch.
  """
  if accumulate < 1:
    raise ValueError(f"accumulate must be at least 1, found {accumulate}")
  if accumulate > 1 and method.couples_batch:
    raise ValueError(
      f"{type(method).__name__} computes its loss over the whole batch, so accumulating over "
      f"{accumulate} micro-batches would train on another loss. Set accumulate=1 and use more "
      "devices or a smaller batch."
    )
  value_and_grad = jax.value_and_grad(method.loss, has_aux=True)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    batch = {**batch, "sample": jnp.arange(_batch_size(batch), dtype=jnp.int32)}
    loss, grads, out = _gradients(value_and_grad, state, batch, key, accumulate)
    grad_norms = norms(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norms["train"])

    def move():
      updates, opt_state = tx.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      carry = method.update(params, out.carry, state.step)
      return params, carry, opt_state, norms(updates)

    still = jax.tree.map(jnp.zeros_like, grad_norms)
    kept = (state.params, state.carry, state.opt_state, still)
    params, carry, opt_state, update_norms = _choose(finite, move, kept)
    skipped = jnp.stack([(state.skipped[0] + 1) * ~finite, state.skipped[1] + ~finite])
    measured = {"grad": grad_norms, "param": norms(params), "update": update_norms}
    metrics = {
      **out.metrics,
      "train/loss": loss,
      **{f"{part}/{of}_norm": x for of, found in measured.items() for part, x in found.items()},
      "train/skipped_in_a_row": skipped[0],
      "train/skipped": skipped[1],
    }
    metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
    new = TrainState(state.step + 1, params, carry, opt_state, state.key, skipped)
    return new, metrics

  return step


def _choose(condition: jax.Array, move: Callable[[], Any], kept: Any) -> Any:
  """move() where the condition, else what is kept.

  A CPU computes one of them: selecting, it copies all parameters and moments first, and the update
  takes a quarter more time. A GPU's host would wait for the condition, so there both are computed.
  """
  if platform() == "cpu":
    return jax.lax.cond(condition, move, lambda: kept)
  return jax.tree.map(lambda m, k: jnp.where(condition, m, k), move(), kept)


def _gradients(value_and_grad, state, batch, key, accumulate):
  """Loss, gradient and LossOut of one batch, or of its micro-batches averaged in a scan."""
  if accumulate == 1:
    (loss, out), grads = value_and_grad(state.params, state.carry, batch, key, state.step)
    return loss, grads, out

  # Micro-batch j takes rows j, j + accumulate, ...: every device keeps the rows it holds.
  micro = {k: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1) for k, x in batch.items()}

  def body(carry, rows):
    method_carry, total = carry
    (loss, out), grads = value_and_grad(state.params, method_carry, rows, key, state.step)
    total = jax.tree.map(jnp.add, total, (loss, grads))
    return (out.carry, total), out.metrics

  zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
  (carry, total), metrics = jax.lax.scan(body, (state.carry, zeros), micro)
  loss, grads = jax.tree.map(lambda x: x / accumulate, total)
  return loss, grads, LossOut(carry, jax.tree.map(lambda x: x.mean(0), metrics))


def _batch_size(batch: Batch) -> int:
  chex.assert_equal_shape_prefix(leaves := jax.tree.leaves(batch), 1)
  return leaves[0].shape[0]
