"""python -m jepax.main --config=FILE --dry_run: the whole run in small, before it costs anything.

Builds, compiles, looks at the workdir, reads a batch, takes two steps and encodes a batch of the
probe, all through the code that the run itself uses, so that a fault is the run's own. Writes
nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jepax import fit, sharding, summary
from jepax.checkpoint import Checkpoints, check_workdir
from jepax.config import Run, base
from jepax.core import Method, Metrics, TrainState
from jepax.data.build import Data
from jepax.data.sources import ArraySource
from jepax.evals.features import extract
from jepax.evals.online import Probe
from jepax.experiment import HELD_OUT_LOSS, Experiment, prepare
from jepax.lock import local_path, lock
from jepax.metrics import check_wandb, history_until
from jepax.models.encoder import split
from jepax.start import Start, read_start

_PARTS = {"parameters": "params", "carry": "carry", "optimizer": "opt_state"}
_MEMORY = {"arguments": "argument", "temporaries": "temp", "results": "output", "aliased": "alias"}


@dataclasses.dataclass(frozen=True)
class Findings:
  """What a dry run found; `show` prints it.

  position: step that the run would go on from, 0 for a new one.
  parameters: numbers that the optimizer moves.
  state_bytes: part of the state -> bytes on one device. checkpoint_bytes: of the whole state.
  free_bytes: on the disk of the workdir.
  step_memory: 'arguments', 'temporaries', 'results', 'aliased' and, where the compiler gives it,
    'peak' -> bytes on one device; empty where the backend tells none.
  device_bytes: what a device has, None where it does not tell.
  compile_seconds, step_seconds, probe_seconds: of the training step's compilation, of the second
    of two steps, and of encoding the probe's images once with one encoder.
  held_out_loss: of a batch of the probe's images, after two steps; None without held-out images.
  input_seconds: for one batch with the configured threads, as if they ran on cores of their own.
  metrics: of the second step.
  start: which weights the run starts from; '' for random ones, or where it goes on.
  moved: 'parameters', 'BRANCH encoder', 'optimizer' -> (leaves that two steps changed, leaves).
  """

  experiment: Experiment
  workdir: Path
  position: int
  parameters: int
  state_bytes: dict[str, int]
  checkpoint_bytes: int
  free_bytes: int
  step_memory: dict[str, int]
  device_bytes: int | None
  compile_seconds: float
  step_seconds: float
  input_seconds: float
  probe_seconds: float
  held_out_loss: float | None
  metrics: dict[str, float]
  start: str
  moved: dict[str, tuple[int, int]]

  @property
  def input_share(self) -> float:
    """Seconds that a batch takes to load over those that a step takes; above 1 training waits."""
    return self.input_seconds / self.step_seconds

  @property
  def train_seconds(self) -> float:
    """Estimate of what the steps left will take, without probes, saves and the report."""
    left = self.experiment.steps - self.position
    return left * max(self.step_seconds, self.input_seconds)


def run(
  config: ConfigDict,
  workdir: str | Path,
  *,
  data: Data | None = None,
  method: Method | Callable[[Run], Method] | None = None,
) -> Findings:
  """Does once all that a run does over and over, and measures it.

  Args:
    config: as for `jepax.fit.run`.
    workdir: the run's; nothing is written there.
    data, method: as for `jepax.fit.run`.

  Raises:
    ValueError, OSError, fit.Diverged: what the run would raise in its first steps; and ValueError
      where the step does not fit the device, or two steps leave the parameters, an encoder or
      the optimizer as they were.
  """
  workdir = local_path(workdir)
  # 1. All that can be checked without compiling.
  experiment = prepare(config, data=data, method=method)
  probe = summary.make_probe(experiment, final=False)
  fit.check_stop(experiment, probe)
  check_wandb(config.log.wandb)
  start = read_start(experiment, workdir)
  checkpoint_bytes = sum(map(_bytes, jax.tree.leaves(experiment.abstract_state)))
  free = look_at(experiment, workdir, checkpoint_bytes)
  # 2. The state, new or saved, and one batch.
  state, position = restore(experiment, workdir, start=start)
  batch, input_seconds = read_batch(experiment, min(position, experiment.steps - 1))
  # 3. Two steps and a batch of the probe.
  step, compile_seconds, memory = compile_step(experiment, state, batch)
  state, metrics, step_seconds, moved = take_steps(experiment, step, state, batch)
  return Findings(
    experiment=experiment,
    workdir=workdir,
    position=position,
    parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
    state_bytes=state_bytes(experiment),
    checkpoint_bytes=checkpoint_bytes,
    free_bytes=free,
    step_memory=memory,
    device_bytes=_device_bytes(),
    compile_seconds=compile_seconds,
    step_seconds=step_seconds,
    input_seconds=input_seconds,
    probe_seconds=encode_probe(experiment, state, probe),
    held_out_loss=experiment.held_out_loss(
      state, probe.queries["image"][: experiment.config.batch_size]
    ).get(HELD_OUT_LOSS),
    metrics=fit.scalars(metrics),
    start="" if start is None else start.text,
    moved=moved,
  )


def state_bytes(experiment: Experiment) -> dict[str, int]:
  """Bytes of each part of the state that lie on one device."""
  state = experiment.abstract_state
  parts = {name: jax.tree.leaves(getattr(state, field)) for name, field in _PARTS.items()}
  return {
    name: sum(_bytes(leaf, shape=leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    for name, leaves in parts.items()
  }


def _bytes(leaf: jax.ShapeDtypeStruct, *, shape: tuple[int, ...] | None = None) -> int:
  return math.prod(leaf.shape if shape is None else shape) * leaf.dtype.itemsize


def look_at(experiment: Experiment, workdir: Path, checkpoint_bytes: int) -> int:
  """Checks that the run may have its workdir and can write there; returns the bytes free.

  Raises:
    ValueError: it holds something else, or another process trains there.
    OSError: it can't be made or written, or not one checkpoint fits.
  """
  known = base().to_dict()
  check_workdir(workdir, fit.identity(experiment), ignore=fit.FREE_KEYS, defaults=known)
  if jax.process_index() == 0 and (workdir / ".lock").exists():
    with lock(workdir):  # free, so nobody trains there
      pass
  existing = next(path for path in (workdir, *workdir.parents) if path.exists())
  if not existing.is_dir():
    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(workdir))
  if not os.access(existing, os.W_OK | os.X_OK):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(workdir))
  free = shutil.disk_usage(existing).free
  if free < checkpoint_bytes:
    reason = f"{os.strerror(errno.ENOSPC)} for a checkpoint of {_size(checkpoint_bytes)}"
    raise OSError(errno.ENOSPC, reason, str(workdir))
  return free


def restore(
  experiment: Experiment, workdir: Path, *, start: Start | None = None
) -> tuple[TrainState, int]:
  """The state to try, and the step that the run would go on from."""
  if start is not None:
    return start.into(experiment.initial_state()), 0
  if not (workdir / "checkpoints").is_dir():
    return experiment.initial_state(), 0
  with Checkpoints(workdir / "checkpoints") as saved:
    state, memory = fit.restore(experiment, saved)
  history_until(workdir, memory.position)
  if memory.position == experiment.steps:  # finished: its schedules have come to rest
    state = experiment.initial_state()
  return state, memory.position


def read_batch(experiment: Experiment, position: int) -> tuple[dict[str, jax.Array], float]:
  """One global batch on the devices, and the seconds that one takes with the threads configured."""
  data, config = experiment.data, ConfigDict(experiment.config)
  workers = min(config.data.threads, sharding.cores())
  if isinstance(data.train, ArraySource) and data.train_transform is None:
    workers = 1  # a copy in memory, which the loader makes in the thread of the loop
  with config.unlocked():
    config.data.threads = config.data.prefetch = 0  # alone: nothing loads ahead
  with dataclasses.replace(experiment, config=config).loader(start=position) as loader:
    begin = time.perf_counter()
    batch = next(loader)
    seconds = time.perf_counter() - begin
  images = sharding.global_batch({"image": batch["image"]}, experiment.batch_sharding)
  return images, seconds / workers


def compile_step(
  experiment: Experiment, state: TrainState, batch: dict[str, jax.Array]
) -> tuple[Callable, float, dict[str, int]]:
  """The compiled training step, the seconds it took, and its memory on one device in bytes."""
  begin = time.perf_counter()
  with jax.set_mesh(experiment.mesh), _fits():
    compiled = experiment.train_step.__wrapped__.lower(state, batch).compile()
  seconds = time.perf_counter() - begin
  analysis = compiled.memory_analysis()
  if analysis is None:
    return compiled, seconds, {}
  memory = {name: getattr(analysis, f"{field}_size_in_bytes") for name, field in _MEMORY.items()}
  if analysis.peak_memory_in_bytes > memory["temporaries"]:  # the CPU's leaves them out
    memory["peak"] = analysis.peak_memory_in_bytes
  return compiled, seconds, memory


@contextlib.contextmanager
def _fits() -> Iterator[None]:
  """Says in one line that a device has too little memory."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise ValueError(
      f"the training step does not fit the device: {' '.join(str(error).split())[:300]} ... Raise "
      "mesh.fsdp or accumulate, set method.encoder.remat (of a ViT), or lower batch_size."
    ) from error


def take_steps(
  experiment: Experiment, step: Callable, state: TrainState, batch: dict[str, jax.Array]
) -> tuple[TrainState, Metrics, float, dict[str, tuple[int, int]]]:
  """Two updates on one batch: the state, its metrics, seconds of the second, and what moved.

  Two, because the first may have a learning rate of 0.

  Raises:
    fit.Diverged: an update was not finite.
    ValueError: the parameters, an encoder or the optimizer stayed as they were.
  """
  fingerprints = _fingerprints(experiment)
  before = jax.device_get(fingerprints(state))
  for _ in range(2):
    begin = time.perf_counter()
    with _fits():
      state, metrics = jax.block_until_ready(step(state, batch))
    seconds = time.perf_counter() - begin
    if metrics["train/skipped_in_a_row"]:
      raise fit.Diverged(
        f"update {int(state.step)} is not finite: loss {float(metrics['train/loss']):.4g}, norm of "
        f"the gradient {float(metrics['train/grad_norm']):.4g}. Check data.mean and data.std, "
        "lower optim.lr, or use precision='float32'."
      )
  after = jax.device_get(fingerprints(state))
  moved = {name: (int((old != after[name]).sum()), old.size) for name, old in before.items()}
  still = [name for name, (count, _) in moved.items() if not count]
  if experiment.config.optim.frozen:  # which may be all of an encoder, never all parameters
    still = [name for name in still if not name.endswith(" encoder")]
  if still:
    raise ValueError(
      f"two steps changed nothing in: {', '.join(still)}. Check optim.lr, the method's loss (does "
      "a gradient reach them?) and its update and momentum."
    )
  return state, metrics, seconds, moved


def _fingerprints(experiment: Experiment) -> Callable[[TrainState], dict[str, jax.Array]]:
  """Jitted: a number for each leaf, u32, in each part of a state; a leaf that changes changes it.

  The steps are donated the state they start from: to keep a copy would need its memory again.
  """
  method = experiment.method

  def bits(leaf):
    unsigned = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    return jnp.sum(unsigned, dtype=jnp.uint32)

  def parts(state):
    encoders = {
      f"{branch} encoder": split(method.weights(state.params, state.carry, branch=branch))[0]
      for branch in method.branches  # less running statistics, which move whatever is learned
    }
    trees = {"parameters": state.params, **encoders, "optimizer": state.opt_state}
    return {name: jnp.stack(list(map(bits, _floats(tree)))) for name, tree in trees.items()}

  return jax.jit(parts, out_shardings=sharding.replicated(experiment.mesh))


def _floats(tree: Any) -> list[jax.Array]:
  """The leaves that learning moves: an optimizer's counters move whatever happens."""
  return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def encode_probe(experiment: Experiment, state: TrainState, probe: Probe) -> float:
  """Seconds to encode the probe's images with one encoder, judged by one batch of them.

  Raises:
    ValueError: features that are not finite.
  """
  encode = experiment.encoders(state)[experiment.method.branches[0]]
  images, size = probe.queries["image"], probe.batch_size
  for _ in range(2):  # the first one compiles
    begin = time.perf_counter()
    features = extract(encode, images[:size], batch_size=size)
    seconds = time.perf_counter() - begin
  if not np.isfinite(features).all():
    raise ValueError(f"the {experiment.method.branches[0]} encoder's features are not finite")
  return seconds * sum(math.ceil(len(rows["image"]) / size) for rows in (probe.bank, probe.queries))


def _device_bytes() -> int | None:
  """Memory of a device, where it tells."""
  return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def show(findings: Findings) -> None:
  """Prints what was found, once for all processes."""
  if jax.process_index() == 0:
    print("\n".join(f"{name:12}{text}" for name, text in _table(findings).items()))
    print("dry run: all went well, nothing was written")


def _table(found: Findings) -> dict[str, str]:
  """What `show` prints: name of a row -> its text."""
  experiment, config = found.experiment, found.experiment.config
  mesh = " x ".join(f"{name} {size}" for name, size in experiment.mesh.shape.items())
  devices = f"{experiment.mesh.size} x {jax.devices()[0].device_kind}, mesh {mesh}"
  images = len(experiment.data.train)
  epochs = experiment.steps / (images // config.batch_size)
  state = ", ".join(f"{name} {_size(n)}" for name, n in found.state_bytes.items())
  memory = ", ".join(f"{name} {_size(n)}" for name, n in found.step_memory.items())
  of = f"; a device has {_size(found.device_bytes)}" if found.device_bytes else ""
  every = experiment.every["eval"]
  probes = (experiment.steps - 1) // every + 1 if every else 1  # one at random initialisation
  moved = ", ".join(f"{name} {count} of {all_}" for name, (count, all_) in found.moved.items())
  loss = found.held_out_loss
  held_out = "" if loss is None else f"; held-out loss {loss:.4g}"
  return {
    "method": f"{experiment.name}, {found.parameters:,} parameters, {config.precision}",
    "start": found.start or _no_start(found),
    "devices": f"{devices}, {jax.process_count()} process(es)",
    "run": f"{experiment.steps:,} steps of {config.batch_size:,} images, {epochs:,.1f} epochs of "
    f"{images:,}, {config.accumulate} micro-batch(es) a step",
    "state": f"{_size(sum(found.state_bytes.values()))} a device: {state}",
    "memory": f"of a step on a device: {memory or 'not told by this backend'}{of}",
    "compile": f"{found.compile_seconds:.1f} s",
    "step": f"{found.step_seconds:.3g} s, {config.batch_size / found.step_seconds:,.0f} images/s, "
    f"loss {found.metrics['train/loss']:.4g}",
    "metrics": ", ".join(f"{name} {value:.3g}" for name, value in sorted(found.metrics.items())),
    "input": f"{found.input_seconds:.3g} s a batch, {found.input_share:.0%} of a step"
    + " (training would wait)" * (found.input_share > 1),
    "probe": f"{found.probe_seconds:.3g} s to encode once with one of "
    f"{len(experiment.method.branches)} encoder(s), {probes} times{held_out}",
    "moved": f"{moved} leaves",
    "workdir": f"{found.workdir}: {_status(found)}; a checkpoint takes "
    f"{_size(found.checkpoint_bytes)}, {config.checkpoint.keep} are kept, "
    f"{_size(found.free_bytes)} free",
    "estimate": f"{_time(found.train_seconds)} of training, without probes and saves",
  }


def _no_start(found: Findings) -> str:
  """Why no weights were read."""
  if found.experiment.config.init.weights:
    return "init.weights is not read: the workdir has a checkpoint to go on from"
  return "random initialisation" if not found.position else "the workdir's checkpoint"


def _status(found: Findings) -> str:
  steps = found.experiment.steps
  if found.position == steps:
    return f"finished at step {steps:,}; the command would only evaluate it again"
  if found.position:
    return f"goes on from step {found.position:,}"
  return "a run without a checkpoint, starts anew" if found.workdir.exists() else "a new run"


def _size(count: int) -> str:
  """4200000 -> '4.2 MB'."""
  power = min(max(0, (len(str(count)) - 1) // 3), 5)
  return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def _time(seconds: float) -> str:
  """4000 -> '1.1 hours'."""
  for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
    if seconds >= length:
      return f"{seconds / length:.1f} {unit}"
  return f"{seconds:.2g} seconds"
