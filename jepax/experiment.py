"""From a config to everything a run needs, built and checked before anything compiles."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jepax import compiler, given, optim, sharding
from jepax import config as config_lib
from jepax.core import Batch, Features, Method, Metrics, TrainState, init_state, make_train_step
from jepax.data.build import Data
from jepax.data.build import build as build_data
from jepax.data.loader import Loader
from jepax.evals import collapse
from jepax.evals.batches import in_batches

HELD_OUT_LOSS = "eval/loss"


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A run made concrete. The jitted functions compile at their first call.

  steps: optimizer steps of the whole run. every: 'log', 'eval', 'checkpoint' -> steps between
  two of them, 0 for never. schedules: name -> step -> value, for the log.
  init: key -> TrainState. train_step: (state, batch) -> (state, metrics), donates the state.
  encode: branch -> (params, carry, images u8[b h w c]) -> Features.
  losses: (params, carry, step, images u8[b h w c], index i32[b]) -> f32[b], of each image; unless
  per_sample, where images are coupled, that of the batch, b times.
  batch_sharding: where batches lie. abstract_state: shapes, dtypes and places of the state.
  metrics: names of what train_step measures.
  """

  config: ConfigDict
  data: Data
  method: Method
  mesh: Mesh
  steps: int
  every: dict[str, int]
  schedules: dict[str, optim.Schedule]
  init: Callable[[jax.Array], TrainState]
  train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
  encode: dict[str, Callable[..., Features]]
  losses: Callable[..., jax.Array]
  per_sample: bool
  batch_sharding: Any
  abstract_state: Any
  metrics: tuple[str, ...]

  @property
  def name(self) -> str:
    """The method's: as the config names it, or the class of one that the caller made."""
    return self.config.method.name if self.config.method else type(self.method).__name__

  def described(self) -> dict[str, Any]:
    """The config, with what it does not say: which method the caller made."""
    found = self.config.to_dict()
    return found if found["method"] else {**found, "given_method": given.describe(self.method)}

  def loader(self, *, start: int) -> Loader:
    """This process's rows of the training batches, from global batch `start` on."""
    c = self.config
    return Loader(
      self.data.train,
      self.data.train_transform,
      batch_size=c.batch_size,
      seed=c.seed,
      start=start,
      stop=self.steps,
      rows=sharding.local_rows(self.batch_sharding, count=c.batch_size),
      threads=c.data.threads,
      prefetch=c.data.prefetch,
      max_bad_fraction=c.data.max_bad_fraction,
    )

  def initial_state(self) -> TrainState:
    """The state of step 0 at random initialisation, a function of config.seed alone."""
    return self.init(jax.random.key(self.config.seed))

  def encoders(self, state: TrainState) -> dict[str, Callable[[np.ndarray], Features]]:
    """Branch -> (images u8[b h w c] -> Features), with the weights of `state`."""

    def bind(encode):
      return lambda images: encode(state.params, state.carry, self._place(images))

    return {branch: bind(encode) for branch, encode in self.encode.items()}

  def held_out_loss(self, state: TrainState, images: np.ndarray) -> dict[str, float]:
    """{'eval/loss': the method's own loss on images it does not learn from}, empty without any.

    The same for the same state.

    Views and masks come from a fixed key and an image's place among the images, as in training
    from the step's key and the row. It is computed in batches of the training's size (micro-batches
    where it accumulates), and is the mean over images, so that the size does not matter; but for
    masks with compat='ijepa', which cut the contexts of neighbours to one length.

    A loss that couples the batch, or does not give that of each sample, is the mean over full
    batches of config.batch_size, without the remainder. Of fewer images than that a batch is the
    largest number of them that divides config.batch_size and over the devices; all of them where
    there is none.

    Args:
      state: nothing of it changes.
      images: of the probe, u8[n h w c], n at least 2, all on every process.
    """
    if self.data.test is None:
      return {}
    size, count = self.config.batch_size // self.config.accumulate, len(images)
    if not self.per_sample:
      size = self._coupled_batch(count)
      count -= count % size

    def losses(index: np.ndarray) -> jax.Array:
      placed = self._place(images[index]), self._place(index)
      return self.losses(state.params, state.carry, state.step, *placed)

    found = in_batches(losses, np.arange(count, dtype=np.int32), batch_size=size)
    return {HELD_OUT_LOSS: float(found.mean(dtype=np.float64))}

  def _coupled_batch(self, count: int) -> int:
    """Images a batch, of `count`, where the loss couples them."""
    size, parts = self.config.batch_size, sharding.row_parts(self.mesh)
    fits = [n for n in range(parts, min(count, size) + 1, parts) if size % n == 0 and n > 1]
    return max(fits, default=count)

  def _place(self, rows: np.ndarray) -> jax.Array:
    """Rows [b ...] that every process has: split over the devices, where they divide."""
    split = len(rows) % sharding.row_parts(self.mesh) == 0
    place = self.batch_sharding if split else sharding.replicated(self.mesh)
    return jax.make_array_from_callback(rows.shape, place, lambda at: rows[at])

  def distances(self, state: TrainState) -> dict[str, dict[str, float]]:
    """{'target': {'ema_distance': ..}} of a method with a target, else empty."""
    if not {"target", "online"} <= set(self.method.branches):
      return {}
    target, online = (
      self.method.weights(state.params, state.carry, branch=branch)
      for branch in ("target", "online")
    )
    if jax.tree.structure(target) != jax.tree.structure(online):
      return {}  # of a caller's method: no average of the other
    return {"target": {"ema_distance": float(collapse.ema_distance(target, online))}}


def prepare(
  config: ConfigDict,
  *,
  data: Data | None = None,
  mesh: Mesh | None = None,
  method: Method | Callable[[config_lib.Run], Method] | None = None,
) -> Experiment:
  """Builds a run and checks all that can be checked without compiling.

  Args:
    config: from `jepax.config.load`, or `base()` filled in by hand.
    data: images of the caller's own; by default those that config.data names.
    mesh: devices of the caller's own choice; by default all, as config.mesh arranges them.
    method: of the caller's own, or a function that makes one for this run; config.method is then
      empty. By default the one that config.method names.

  Raises:
    ValueError: any setting that can't work, with what was found, what is allowed and a remedy.
  """
  config_lib.check_keys(config)
  if method is not None and config.method:
    raise ValueError(
      f"method= was given, and config.method describes another, {config.method.to_dict()}: leave "
      "out method= to train that one, or set config.method = ConfigDict() to train your own"
    )
  _check_numbers(config)
  _check_init(config.init)
  config_lib.one_of(config.precision, config_lib.PRECISIONS, where="precision")
  mesh = mesh or sharding.make_mesh(
    data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor
  )
  _check_batch(config, mesh)
  data = build_data(config.data) if data is None else data
  lengths = _durations(config, len(data.train))
  steps = lengths.pop("total")
  run = config_lib.Run(
    size=data.size,
    channels=data.channels,
    mean=data.mean,
    std=data.std,
    steps=steps,
    dtype=config_lib.PRECISIONS[config.precision],
  )
  if method is None:
    method = config_lib.build_method(config.method, run)
  else:
    method = given.resolve(method, run)
  optimizer = optim.build(
    config.optim, steps=steps, warmup=lengths.pop("warmup"), freeze=lengths.pop("freeze")
  )
  return _compile_ready(config, data, method, mesh, steps, lengths, optimizer)


def _compile_ready(config, data, method, mesh, steps, every, optimizer) -> Experiment:
  """Wraps the pure functions in jit with their placements; traces `init` to learn the shapes."""
  image = jax.ShapeDtypeStruct((config.batch_size, data.size, data.size, data.channels), np.uint8)
  tx = optimizer.tx

  def init(key):
    return init_state(method, tx, key, {"image": jnp.zeros(image.shape, image.dtype)})

  step = make_train_step(method, tx, accumulate=config.accumulate)
  key = jax.eval_shape(jax.random.key, 0)  # a real one lies on devices, which a plan's mesh has not
  replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  options = compiler.options(mesh)
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(init, key)
    placement = sharding.state_shardings(mesh, shapes)
    abstract = jax.tree.map(lambda x, place: x.update(sharding=place), shapes, placement)
    per_sample = not method.couples_batch
    if not config.method:  # the library's own are tested for it
      per_sample &= given.check_shapes(method, shapes, {"image": image})
    # With placements, as the first step has them: it then needs no second trace.
    _, metrics = jax.eval_shape(step, abstract, {"image": image.update(sharding=rows)})

  def encoder(branch):
    def encode(params, carry, images):
      return method.encode(params, carry, {"image": images}, branch=branch)

    return _on_mesh(mesh, jax.jit(encode, out_shardings=replicated, compiler_options=options))

  def losses(params, carry, step, images, index):
    batch = {"image": images, "sample": index}
    loss, out = method.loss(params, carry, batch, jax.random.key(0), step)
    return out.each if per_sample else jnp.broadcast_to(loss, index.shape)

  return Experiment(
    config=config,
    data=data,
    method=method,
    mesh=mesh,
    steps=steps,
    every=every,
    schedules=optimizer.schedules,
    init=_on_mesh(mesh, jax.jit(init, out_shardings=placement)),
    train_step=_on_mesh(
      mesh,
      jax.jit(
        step,
        in_shardings=(placement, rows),
        out_shardings=(placement, replicated),
        donate_argnums=0,
        compiler_options=options,
      ),
    ),
    encode={branch: encoder(branch) for branch in method.branches},
    losses=_on_mesh(mesh, jax.jit(losses, out_shardings=replicated, compiler_options=options)),
    per_sample=per_sample,
    batch_sharding=rows,
    metrics=tuple(metrics),
    abstract_state=abstract,
  )


def _on_mesh(mesh: Mesh, function: Callable) -> Callable:
  """Calls `function` inside the mesh, which activation constraints look up; it is __wrapped__."""

  @functools.wraps(function)
  def call(*arguments):
    with jax.set_mesh(mesh):
      return function(*arguments)

  return call


def _check_numbers(config: ConfigDict) -> None:
  """Numbers that would fail late: at a step, at a probe, or after training."""
  config_lib.positive(
    config, "batch_size", "accumulate", "max_skipped", "checkpoint.keep", "eval.batch_size"
  )
  config_lib.positive(config, "stop.patience")
  for key in ("min_delta", "collapse"):
    if config.stop[key] < 0:
      raise ValueError(f"stop.{key}={config.stop[key]} must not be negative")
  if not 0 <= config.seed < 2**32:  # JAX would take it modulo 2^32
    raise ValueError(f"seed={config.seed} must lie in 0..{2**32 - 1}")
  for key in ("bank", "queries", "final_bank", "final_queries"):
    if config.eval[key] < 2:
      raise ValueError(
        f"eval.{key}={config.eval[key]} must be at least 2: collapse is seen across images"
      )


def _check_init(init: ConfigDict) -> None:
  """What can be said of the weights to start from without reading them (`jepax.start`)."""
  config_lib.one_of(init.positions, ("", "interpolate", "recompute"), where="init.positions")
  idle = [f"init.{key}={init[key]!r}" for key in ("branch", "positions") if init[key]]
  if idle and not init.weights:
    raise ValueError(f"{' and '.join(idle)} without weights to start from: set init.weights")


def _check_batch(config: ConfigDict, mesh: Mesh) -> None:
  devices = sharding.row_parts(mesh)
  parts = devices * config.accumulate
  if config.batch_size % parts:
    below = config.batch_size // parts * parts
    near = [n for n in (below, below + parts) if n]
    raise ValueError(
      f"batch_size={config.batch_size} does not divide over {devices} device(s) x "
      f"accumulate={config.accumulate}; nearest that do: {near}"
    )


def _durations(config: ConfigDict, examples: int) -> dict[str, int]:
  """The config's durations in steps: total, warmup, freeze, log, eval, checkpoint."""
  if examples < config.batch_size:
    raise ValueError(
      f"batch_size={config.batch_size} exceeds the {examples} training images; lower batch_size"
    )
  scale = dict(steps_per_epoch=examples // config.batch_size, batch_size=config.batch_size)
  steps = config_lib.duration(config.total, where="total", **scale)
  if steps < 1:
    raise ValueError(f"total={config.total!r} is no step at all")
  if steps >= 2**31:  # the state counts them in int32
    raise ValueError(f"total={config.total!r} is {steps} steps; at most {2**31 - 1} can be counted")
  keys = {
    "warmup": ("optim.warmup", config.optim.warmup),
    "freeze": ("optim.freeze", config.optim.freeze),
    "log": ("log.every", config.log.every),
    "eval": ("eval.every", config.eval.every),
    "checkpoint": ("checkpoint.every", config.checkpoint.every),
  }
  lengths = {
    name: config_lib.duration(value, where=where, total=steps, **scale)
    for name, (where, value) in keys.items()
  }
  if lengths["log"] < 1:
    raise ValueError(f"log.every={config.log.every!r} must be at least one step")
  return {"total": steps, **lengths}
