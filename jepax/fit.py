"""The loop: restore, step, log, probe, save, report.

`run(config, workdir)` is the one-call form; `python -m jepax.main` is a thin face on it. What one
step does stands in `core.py`; how a config becomes the pieces used here, in `experiment.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from jepax import distributed, peers, sharding, summary
from jepax.checkpoint import Checkpoints, Preemption, finished_steps, guard
from jepax.config import Run, base, one_of
from jepax.core import Method, TrainState
from jepax.data.build import Data
from jepax.data.loader import Loader
from jepax.evals.online import SCORES, Probe, flatten
from jepax.experiment import HELD_OUT_LOSS, Experiment, prepare
from jepax.lock import local_path, lock
from jepax.metrics import SHOWN, Progress, Shown, Writer, check_wandb
from jepax.pretrained import Preprocess
from jepax.start import Start, read_start
from jepax.timing import StepTimer
from jepax.versions import code_version

# What may change between the run in a workdir and the one that continues it.
FREE_KEYS = (
  *("log", "checkpoint", "eval", "mesh", "stop", "max_skipped"),
  *("data.threads", "data.prefetch", "data.memory_limit", "data.label"),
)


SCORED = tuple(f"{name}/" for name in SCORES)


class Diverged(RuntimeError):
  """Too many updates in a row were not finite."""


class Failed(RuntimeError):
  """Storage failed a run under way, which may go well when started again, unlike a mistake."""


@dataclasses.dataclass
class Memory:
  """What a run remembers beside its state; saved with every checkpoint as JSON.

  position: the next global batch. seconds: of training so far, probes and saves left out.
  control: collapse numbers of the encoder at random initialisation, what alarms compare with.
  start: of weights that the run started from, what `summary.probe_start` found.
  best, best_step, waited: of early stopping: the best value, its step, and probes since.
  collapsed: probes in a row with a collapse alarm.
  stopped_by: the rule that ended the run early, config.stop.
  """

  position: int = 0
  seconds: float = 0.0
  control: dict[str, float] | None = None
  start: dict[str, Any] | None = None
  best: float | None = None
  best_step: int | None = None
  waited: int = 0
  collapsed: int = 0
  stopped_by: dict[str, Any] | None = None


def run(
  config: ConfigDict,
  workdir: str | Path,
  *,
  data: Data | None = None,
  method: Method | Callable[[Run], Method] | None = None,
  command: str | None = None,
) -> dict[str, Any]:
  """Trains what a config describes, from the last checkpoint in `workdir` if there is one.

  Args:
    config: from `jepax.config.load`, or `jepax.config.base()` filled in by hand.
    workdir: where checkpoints, metrics.jsonl, results.json and report.html go.
    data: images of the caller's own, see `jepax.data.build.Data.from_arrays`; by default those
      that config.data names.
    method: of the caller's own, a `jepax.core.Method` or a function that makes one for a
      `jepax.config.Run`; config.method is then empty. By default the one that config.method names.
    command: how this run was started, for the report.

  Returns:
    What results.json holds; its train.status is 'finished' or 'stopped' (early). After a signal
    nothing is evaluated or written: {'train': {'status': 'preempted', 'steps': ...}}. Of several
    processes, those but the first get no more than that in any case.

  Raises:
    ValueError: a setting that can't work, or a workdir that holds something else or is in use.
    Diverged: config.max_skipped updates in a row were not finite.
    Failed: a file could not be written or read once training had begun.
  """
  workdir = local_path(workdir)
  experiment = prepare(config, data=data, method=method)
  probe = summary.make_probe(experiment, final=False)
  check_stop(experiment, probe)
  check_wandb(config.log.wandb)
  start = read_start(experiment, workdir)
  with contextlib.ExitStack() as stack:
    claim(workdir, experiment, stack)
    stack.enter_context(peers.watch(functools.partial(end_without, workdir=workdir)))
    stack.enter_context(under_way())
    state, memory, status = train(experiment, probe, workdir, start=start)
    if status == "preempted":
      return {"train": {"status": status, "steps": memory.position}}
    if jax.process_index() == 0:
      print("final probes and report ...", flush=True)
    own = "" if method is None else ", method=..."
    command = command or f"jepax.fit.run(config, {str(workdir)!r}{own})"
    return summary.finish(
      experiment,
      state,
      workdir,
      status=status,
      seconds=memory.seconds,
      command=command,
      start=memory.start,
    )


@contextlib.contextmanager
def under_way() -> Iterator[None]:
  """Raises Failed for OSError: so late it comes from storage, not from a setting."""
  try:
    yield
  except OSError as error:
    raise Failed(
      f"{error}; the run goes on from its last checkpoint when it is started again"
    ) from error


def claim(workdir: Path, experiment: Experiment, stack: contextlib.ExitStack) -> None:
  """Writes the config and takes the lock, or refuses, on all processes alike."""

  def on_first() -> None:
    guard(workdir, identity(experiment), ignore=FREE_KEYS, defaults=base().to_dict())
    stack.enter_context(lock(workdir))

  distributed.on_first(on_first)
  distributed.on_all(
    (workdir / "config.json").exists(),
    error=f"{workdir} must be storage that all processes share; what the first wrote is missing on",
  )


def identity(experiment: Experiment) -> dict[str, Any]:
  """What makes a run this run and no other, but for FREE_KEYS: what its workdir is claimed by."""
  found = experiment.described()
  if experiment.data.given:  # the config does not say which images these are
    found["given_data"] = experiment.data.fingerprint()
  return found


def end_without(lost: int, *, workdir: Path) -> None:
  """Ends this process, which can do nothing but wait for the one that is lost."""
  step = max(finished_steps(workdir / "checkpoints"), default=None)
  print(
    f"error: process {lost} of {jax.process_count()} was lost; its own last lines may say why. "
    "Start the same command again on all of them: "
    + ("it begins anew" if step is None else f"it resumes from step {step}"),
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)  # this is a thread; and the ordinary way out waits for all processes


def check_stop(experiment: Experiment, probe: Probe) -> None:
  """Raises ValueError where config.stop can't work."""
  rule = experiment.config.stop
  if (rule.metric or rule.collapse) and not experiment.every["eval"]:
    raise ValueError("config.stop is judged at the probes: set eval.every, for example '10%'")
  if not rule.metric:
    return
  one_of(rule.mode, ("max", "min"), where="stop.mode")
  probed = probe.metrics(experiment.method.branches)
  if experiment.data.test is not None:
    probed.append(HELD_OUT_LOSS)
  elif rule.metric == HELD_OUT_LOSS or rule.metric.startswith(SCORED):
    raise ValueError(
      f"stop.metric={rule.metric!r} needs held-out images, and this data has none: set "
      "data.eval_fraction, or give a test split"
    )
  if probe.num_classes is None and rule.metric.startswith(SCORED):
    raise ValueError(f"stop.metric={rule.metric!r} needs labels, of two classes or more")
  one_of(rule.metric, [*experiment.metrics, *probed], where="stop.metric")
  if rule.metric == HELD_OUT_LOSS and rule.mode == "max":
    raise ValueError(
      f"stop.metric={HELD_OUT_LOSS!r} is the better the smaller: set stop.mode='min'"
    )


def train(
  experiment: Experiment, probe: Probe, workdir: Path, *, start: Start | None
) -> tuple[TrainState, Memory, str]:
  """Goes on from the last checkpoint; returns the state to evaluate, the memory and the status."""
  with contextlib.ExitStack() as stack:
    every, keep = (
      experiment.every["checkpoint"] or experiment.steps,
      experiment.config.checkpoint.keep,
    )
    saved = stack.enter_context(Checkpoints(workdir / "checkpoints", every=every, keep=keep))
    best = None
    if experiment.config.stop.metric:
      best = stack.enter_context(Checkpoints(workdir / "best", every=1, keep=1))
    state, memory = restore(experiment, saved)
    rule = experiment.config.stop.to_dict()
    if memory.stopped_by and base().stop.to_dict() | memory.stopped_by == rule:
      status = "stopped"  # and then killed before its report was there
    else:
      trainer = Trainer(experiment, probe, saved, best, memory, workdir, start)
      state, status = trainer.train(state)
    preempted = status == "preempted"
    if best is not None and not preempted and memory.best_step not in (None, memory.position):
      state, _ = best.restore(experiment.abstract_state, step=memory.best_step)
      logging.info("the best step, %d, is the one evaluated", memory.best_step)
  return state, memory, status


def restore(experiment: Experiment, saved: Checkpoints) -> tuple[TrainState, Memory]:
  """The newest saved state and its memory, or a fresh state at random initialisation."""
  if saved.latest() is None:
    return experiment.initial_state(), Memory()
  state, meta = saved.restore(experiment.abstract_state)
  memory = Memory(**meta["memory"])
  logging.info("resumed at step %d", memory.position)
  return state, memory


@dataclasses.dataclass
class Trainer:
  """One pass over the steps that are left, with what happens between them."""

  experiment: Experiment
  probe: Probe
  saved: Checkpoints
  best: Checkpoints | None
  memory: Memory
  workdir: Path
  start: Start | None = None

  def train(self, state: TrainState) -> tuple[TrainState, str]:
    """Runs to the end, to an early stop or to a signal; returns the state and which of them."""
    run, start = self.experiment, self.memory.position
    first = run.method.branches[0]
    shown = (SHOWN[0], Shown(f"knn/{first}", "k-NN {:.1%}"), *SHOWN[2:])
    log, total = run.config.log, run.steps
    with contextlib.ExitStack() as stack:
      loader = stack.enter_context(run.loader(start=start))
      self.writer = stack.enter_context(
        Writer(
          self.workdir,
          config=run.described(),
          start_step=start,
          tensorboard=log.tensorboard,
          wandb=log.wandb or None,
        )
      )
      self.progress = stack.enter_context(Progress(total, start_step=start, shown=shown))
      preemption = stack.enter_context(Preemption())
      if start == 0:
        self.progress.message("probes at random initialisation, and compiling ...")
        found, _ = self.run_probe(state, 0, {"random_init": first})
        self.memory.control = found["random_init"]
        if self.start is not None:
          state = self.begin(state, self.start)
      else:
        self.progress.message(f"going on from step {start} of {total}")
      self.timer = StepTimer(run.config.batch_size, start_step=start)
      metrics = {}
      self.timed = start  # the step that the current timing interval began at
      self.memory.stopped_by = None
      if start < total and jax.process_index() == 0:  # of an end that is none any more
        (self.workdir / "results.json").unlink(missing_ok=True)
      for step in range(start + 1, total + 1):
        with self.timer.waiting(metrics):
          batch = next(loader)
        # Only images reach the step: no loss can read a label.
        batch = sharding.global_batch({"image": batch["image"]}, run.batch_sharding)
        state, metrics = run.train_step(state, batch)
        self.memory.position = step
        if step == start + 1:
          jax.block_until_ready(metrics)
          self.timer.reset(step)  # most of its time was compilation
          self.progress.begin(step)
          self.timed = step
        status = self.between(step, state, metrics, loader)
        if preemption.reached(step) and status == "running":
          status = "preempted"
        self.save(step, state, force=status != "running")
        if status != "running":
          return state, status
    return state, "finished"

  def begin(self, state: TrainState, start: Start) -> TrainState:
    """The state with the weights to start from, which are probed as they are."""
    self.progress.message(f"starting from {start.text}")
    first = self.experiment.method.branches[0]
    state = start.into(state)
    self.run_probe(state, 0, {"start": first})
    self.memory.start = summary.probe_start(self.experiment, state, origin=start.origin)
    return state

  def between(self, step: int, state: TrainState, metrics: dict, loader: Loader) -> str:
    """Logs and probes where they are due; returns 'running', 'stopped' or 'finished'."""
    every, total = self.experiment.every, self.experiment.steps
    if step % every["log"] == 0 or step == total:
      self.log(step, state, metrics, loader)
    stop = False
    if every["eval"] and step % every["eval"] == 0 and step < total:
      jax.block_until_ready(metrics)  # the steps under way belong to training
      with self.timer.paused():
        branches = {branch: branch for branch in self.experiment.method.branches}
        _, row = self.run_probe(state, step, branches)
        stop = self.stop_early(step, state, scalars(metrics) | row)
      if stop:
        self.memory.stopped_by = self.experiment.config.stop.to_dict()
        if step % every["log"]:  # the report is of the last step
          self.log(step, state, metrics, loader)
    return "finished" if step == total else "stopped" if stop else "running"

  def log(self, step: int, state: TrainState, metrics: dict, loader: Loader) -> None:
    """Writes one row; waits for the device, and raises Diverged where updates keep failing."""
    row = scalars(metrics)
    if step > self.timed:
      times = self.timer.summary(step)
      self.memory.seconds += times["time/step_seconds"] * (step - self.timed)
      self.timed = step
      row |= times
    schedules = self.experiment.schedules
    row |= {name: float(schedule(step - 1)) for name, schedule in schedules.items()}
    row["input/bad_examples"] = loader.bad_examples
    self.writer.write(step, row)
    self.progress.update(step, row)
    skipped, limit = int(row["train/skipped_in_a_row"]), self.experiment.config.max_skipped
    if skipped >= limit:
      self.save(step, state, force=True)
      self.saved.wait()
      raise Diverged(
        f"the last {skipped} updates were not finite (max_skipped={limit}); none of them changed "
        f"the parameters, which are saved at step {step}. Lower optim.lr, set optim.clip, lengthen "
        "optim.warmup, or use precision='float32'."
      )

  def run_probe(
    self, state: TrainState, step: int, branches: dict[str, str]
  ) -> tuple[dict[str, dict], dict[str, float]]:
    """Probes the encoders {shown name: branch}, writes the numbers, sounds the alarms.

    Returns what was found of each encoder, and the row that was written.
    """
    encoders = self.experiment.encoders(state)
    found = self.probe({name: encoders[branch] for name, branch in branches.items()})
    for name, numbers in self.experiment.distances(state).items() if step else ():
      found[name] |= numbers
    count = len(self.probe.queries["image"])
    alarms = summary.alarms(found, control=self.memory.control, count=count)
    for text in alarms:
      self.progress.message(f"ALARM at step {step}: {text}")
    loss = self.experiment.held_out_loss(state, self.probe.queries["image"])
    row = {**flatten(found), **loss, "collapse/alarms": len(alarms)}
    self.writer.write(step, row)
    self.progress.update(step, row)
    return found, row

  def stop_early(self, step: int, state: TrainState, numbers: dict[str, float]) -> bool:
    """Whether to end: alarms at `collapse` probes in a row, or `patience` without a better metric.

    Keeps the state that is best by the metric.
    """
    rule, memory = self.experiment.config.stop, self.memory
    if rule.collapse:
      alarmed = distributed.agree(numbers["collapse/alarms"]) > 0
      memory.collapsed = (memory.collapsed + 1) * alarmed
      if memory.collapsed >= rule.collapse:
        return True
    if not rule.metric:
      return False
    sign = {"max": 1, "min": -1}[rule.mode]
    value = distributed.agree(numbers[rule.metric])
    best = memory.best
    if math.isfinite(value) and (best is None or sign * (value - best) > rule.min_delta):
      memory.best, memory.best_step, memory.waited = value, step, 0
      self.best.save(step, state, meta=self.meta(), force=True)
      return False
    memory.waited += 1
    return memory.waited >= rule.patience

  def save(self, step: int, state: TrainState, *, force: bool) -> None:
    """Saves where it is due, or when forced."""
    every = self.experiment.every["checkpoint"]
    if not force and (not every or step % every):
      return
    jax.block_until_ready(state.step)
    with self.timer.paused():
      self.saved.save(step, state, meta=self.meta(), force=True)

  def meta(self) -> dict[str, Any]:
    """What a checkpoint holds beside the state."""
    return {
      "memory": dataclasses.asdict(self.memory),
      "config": self.experiment.described(),
      "preprocess": dataclasses.asdict(Preprocess.of(self.experiment.data)),
      "code": code_version(),
    }


def scalars(metrics: dict[str, jax.Array]) -> dict[str, float]:
  """Fetches a step's metrics from the device."""
  return {name: float(value) for name, value in jax.device_get(metrics).items()}
