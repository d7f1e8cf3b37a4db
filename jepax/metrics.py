"""What a run says while it runs: metrics.jsonl, TensorBoard, W&B, progress."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath
from rich import progress as rich_progress
from rich.console import Console
from rich.table import Column

_FILE = "metrics.jsonl"


class Writer:
  """Writes scalars to metrics.jsonl and, where wanted, to TensorBoard and W&B; on process 0 only.

  A run that resumes takes back what was written after its checkpoint, so that no metric ever
  stands twice for a step.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    config: Mapping[str, Any],
    start_step: int,
    tensorboard: bool = True,
    wandb: str | None = None,
  ):
    """Opens the writers.

    Args:
      workdir: the run's directory.
      config: the resolved config, for W&B.
      start_step: the step training goes on from; 0 starts the history anew.
      tensorboard: write event files to workdir/tensorboard if the package is installed.
      wandb: the W&B project to report to, or None.

    Raises:
      ValueError: a W&B project without the package; a history that is lost.
    """
    check_wandb(wandb)
    self._path = epath.Path(workdir).expanduser() / _FILE
    self._sinks = []
    self._active = jax.process_index() == 0
    if not self._active:
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    _cut(self._path, start_step)
    if tensorboard and importlib.util.find_spec("tensorboard") is not None:
      self._sinks.append(_TensorBoard(self._path.parent / "tensorboard", start_step))
    if wandb is not None:
      self._sinks.append(_WandB(self._path.parent, wandb, config))

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends one row.

    Args:
      step: updates done.
      metrics: 'group/name' -> scalar; NaN and infinity are written as null.
    """
    if not self._active:
      return
    now = time.time()
    scalars = {name: float(value) for name, value in metrics.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    row = json.dumps({"step": int(step), "time": now, **finite}, allow_nan=False)
    with self._path.open("a") as file:  # closed, hence on disk, after every row
      file.write(row + "\n")
    for sink in self._sinks:
      sink.write(int(step), now, scalars)

  def close(self) -> None:
    """Flushes and closes TensorBoard and W&B."""
    while self._sinks:
      self._sinks.pop().close()


def check_wandb(project: str | None) -> None:
  """Raises ValueError on a W&B project where the package is not installed."""
  if project and importlib.util.find_spec("wandb") is None:
    raise ValueError(
      f"metrics for the W&B project {project!r} need wandb: pip install 'jepax[wandb]', or name "
      "no project (log.wandb)"
    )


def read_history(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl, in order; a last line torn by a crash is left out.

  Args:
    workdir: the run's directory.

  Returns:
    [{'step': int, 'time': seconds since 1970, 'group/name': float or None}], one a `write`.

  Raises:
    FileNotFoundError: the run has written no metrics.
    ValueError: a line before the last is not JSON.
  """
  path = epath.Path(workdir).expanduser() / _FILE
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist: this directory holds no metrics of a run")
  *lines, _torn = path.read_text().split("\n")  # a whole file ends in a newline
  try:
    return [json.loads(line) for line in lines]
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} holds a line that is not JSON: {error.doc[:80]!r}") from error


def _cut(path: epath.Path, start_step: int) -> None:
  """Keeps the rows up to start_step. A run from step 0 writes its step 0 again: keeps none."""
  rows = history_until(path.parent, start_step)
  temporary = path.with_name(f".{_FILE}.tmp")
  temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
  temporary.replace(path)


def history_until(workdir: epath.PathLike, step: int) -> list[dict[str, Any]]:
  """The rows up to a step that a run goes on from; none at step 0.

  Raises:
    ValueError: there are none though there have been steps.
  """
  path = epath.Path(workdir).expanduser() / _FILE
  rows = read_history(workdir) if path.exists() and step > 0 else []
  if step > 0 and not rows:  # a run writes its first row before its first step
    raise ValueError(
      f"{path} holds no metrics though the run is at step {step}: put the file back, or start in "
      "another --workdir"
    )
  return [row for row in rows if row["step"] <= step]


class _TensorBoard:
  """Event files through TensorBoard's own writer, which needs no TensorFlow."""

  def __init__(self, directory: epath.Path, start_step: int):
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    self._writer = EventFileWriter(os.fspath(directory))
    # Tells TensorBoard to forget what an interrupted run showed from here on.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    first = start_step + 1 if start_step else 0
    self._writer.add_event(self._event(step=first, wall_time=time.time(), session_log=start))

  def write(self, step: int, now: float, scalars: Mapping[str, float]) -> None:
    values = [self._summary.Value(tag=k, simple_value=v) for k, v in scalars.items()]
    summary = self._summary(value=values)
    self._writer.add_event(self._event(step=step, wall_time=now, summary=summary))
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class _WandB:
  """One W&B run a workdir: its id is kept there, so that a resumed run goes on in it."""

  def __init__(self, workdir: epath.Path, project: str, config: Mapping[str, Any]):
    import wandb

    identity = workdir / "wandb_id"
    if not identity.exists():
      identity.write_text(uuid.uuid4().hex)
    self._run = wandb.init(
      project=project,
      id=identity.read_text(),
      name=workdir.name,
      dir=os.fspath(workdir),
      config=dict(config),
      resume="allow",
    )

  def write(self, step: int, now: float, scalars: Mapping[str, float]) -> None:
    self._run.log(dict(scalars), step=step)

  def close(self) -> None:
    self._run.finish()


class Shown(NamedTuple):
  """One number of the progress line: the metric it comes from and its format."""

  metric: str
  format: str


SHOWN = (
  Shown("train/loss", "loss {:.4f}"),
  Shown("knn/target", "k-NN {:.1%}"),
  Shown("time/images_per_second", "{:,.0f} images/s"),
  Shown("input/wait", "input wait {:.0%}"),
)


class Progress:
  """One live line on a terminal, one plain line a report anywhere else; process 0 only."""

  def __init__(
    self,
    total: int,
    *,
    start_step: int = 0,
    shown: tuple[Shown, ...] = SHOWN,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Prepares the line; it appears on entering the context.

    Args:
      total: steps of the whole run.
      start_step: steps done before this process began.
      shown: which metrics to print; each keeps its latest value.
      console: where to print, standard output by default.
      clock: seconds, for tests.
    """
    self._total, self._step, self._shown, self._clock = total, start_step, shown, clock
    self._console = console or Console()
    self._latest = {}
    self._begin = None  # (step, time) of the first update: before it lies compilation
    self._active = jax.process_index() == 0
    self._bar = None
    if self._active and self._console.is_terminal and not self._console.is_dumb_terminal:
      self._bar = rich_progress.Progress(
        rich_progress.BarColumn(bar_width=None, table_column=Column(min_width=8, ratio=1)),
        rich_progress.TextColumn("{task.description}", markup=False, table_column=_unwrapped()),
        console=self._console,
        expand=True,
      )
      self._task = self._bar.add_task(self._text(), total=total, completed=start_step)

  def __enter__(self) -> Progress:
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *exception) -> None:
    if self._bar:
      self._bar.stop()

  def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
    """Moves the bar; off a terminal, prints a line if there are metrics.

    Args:
      step: updates done.
      metrics: new values; those not `shown` are ignored.
    """
    if not self._active:
      return
    self._step = step
    self._begin = self._begin or (step, self._clock())
    self._latest.update(metrics or {})
    if self._bar:
      self._bar.update(self._task, completed=step, description=self._text())
    elif metrics:
      self._print(f"step {self._text()}")

  def begin(self, step: int) -> None:
    """Time left is judged by the pace from here on: call once all is compiled."""
    self._begin = (step, self._clock())

  def message(self, text: str) -> None:
    """Prints a line above the bar."""
    if self._active:
      self._print(text)

  def _print(self, text: str) -> None:
    whole = not self._console.is_terminal  # a log keeps a message on one line, a screen breaks it
    self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=whole)

  def _text(self) -> str:
    numbers = [s.format.format(float(self._latest[s.metric])) for s in self._shown_now()]
    # A narrow terminal cuts the end, so what matters most comes first.
    return "  ".join([f"{self._step}/{self._total}", *self._time_left(), *numbers])

  def _shown_now(self) -> list[Shown]:
    return [shown for shown in self._shown if shown.metric in self._latest]

  def _time_left(self) -> list[str]:
    """Wall time at the pace so far, evaluations included: what the user waits for."""
    if self._begin is None or self._step <= self._begin[0]:
      return []
    pace = (self._clock() - self._begin[1]) / (self._step - self._begin[0])
    minutes, seconds = divmod(round(pace * max(self._total - self._step, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return [f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"]


def _unwrapped() -> Column:
  return Column(no_wrap=True, overflow="ellipsis")


def write_json(path: Path, content: dict[str, Any]) -> None:
  """Writes a file whole or not at all, process 0 alone; null stands for what is not finite."""
  if jax.process_index() == 0:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def _finite(content: Any) -> Any:
  """The same with null for numbers that are not finite, which JSON has no way to write."""
  if isinstance(content, dict):
    return {key: _finite(value) for key, value in content.items()}
  if isinstance(content, list):
    return [_finite(value) for value in content]
  return None if isinstance(content, float) and not math.isfinite(content) else content
