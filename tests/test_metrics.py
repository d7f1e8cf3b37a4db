"""What a run writes and prints about itself."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jepax.data.loader import Loader
from jepax.data.sources import ArraySource
from jepax.metrics import Progress, Writer, read_history
from jepax.timing import StepTimer


class Clock:
  """Seconds that pass when told."""

  def __init__(self):
    self.now = 100.0

  def __call__(self) -> float:
    return self.now


def open_writer(workdir, start_step=0, **options):
  options = {"tensorboard": False, **options}
  return Writer(workdir, config={"lr": 0.1}, start_step=start_step, **options)


def steps(workdir) -> list[int]:
  return [row["step"] for row in read_history(workdir)]


def test_rows_are_valid_json_with_null_for_what_is_not_finite(tmp_path):
  with open_writer(tmp_path / "run") as writer:
    writer.write(0, {"train/loss": jnp.float32(0.5), "knn/target": 1})
    writer.write(1, {"train/loss": float("nan"), "train/grad_norm": jnp.inf})
    # Each row is on disk as soon as it is written.
    text = (tmp_path / "run" / "metrics.jsonl").read_text()

  def refuse(constant):
    raise AssertionError(constant)  # json.loads would take NaN, other readers do not

  first, second = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
  assert first == {"step": 0, "time": first["time"], "train/loss": 0.5, "knn/target": 1.0}
  assert second["train/loss"] is None and second["train/grad_norm"] is None
  assert second["time"] >= first["time"] > 1e9
  assert read_history(tmp_path / "run") == [first, second]


def test_resume_takes_back_what_came_after_the_checkpoint(tmp_path):
  with open_writer(tmp_path) as writer:
    for step in (0, 10, 20, 30):
      writer.write(step, {"train/loss": step})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 40, "train/lo')  # a kill in mid-write
  assert steps(tmp_path) == [0, 10, 20, 30]
  with open_writer(tmp_path, start_step=20) as writer:
    assert steps(tmp_path) == [0, 10, 20]
    writer.write(30, {"train/loss": 3.0})
  assert steps(tmp_path) == [0, 10, 20, 30]
  with open_writer(tmp_path, start_step=0):  # no checkpoint was left: step 0 comes again
    assert steps(tmp_path) == []
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_lost_history_is_not_written_over(tmp_path):
  with pytest.raises(ValueError, match="holds no metrics though the run is at step 3"):
    open_writer(tmp_path, start_step=3)
  assert not list(tmp_path.iterdir())


def test_read_history_says_what_is_wrong(tmp_path):
  with pytest.raises(FileNotFoundError, match="no metrics of a run"):
    read_history(tmp_path)
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
  with pytest.raises(ValueError, match="not JSON: 'nonsense'"):
    read_history(tmp_path)


def test_other_processes_write_and_print_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with open_writer(tmp_path / "run") as writer:
    writer.write(1, {"train/loss": 1.0})
  assert not (tmp_path / "run").exists()
  console = Console(file=io.StringIO())
  with Progress(10, console=console) as progress:
    progress.update(1, {"train/loss": 1.0})
    progress.message("hello")
  assert console.file.getvalue() == ""


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
  calls = []

  class Run:
    def log(self, scalars, step):
      calls.append((step, scalars))

    def finish(self):
      calls.append("finished")

  def init(**options):
    calls.append(options)
    return Run()

  module = types.ModuleType("wandb")
  module.init, module.__spec__ = init, importlib.util.spec_from_loader("wandb", None)
  monkeypatch.setitem(sys.modules, "wandb", module)
  for start in (0, 5):
    with open_writer(tmp_path / "run", start_step=start, wandb="jepax") as writer:
      writer.write(start + 1, {"train/loss": 2.0})
  first, row, end, second, *_ = calls
  assert row == (1, {"train/loss": 2.0}) and end == "finished"
  assert first == second
  assert first["project"] == "jepax" and first["config"] == {"lr": 0.1}
  assert first["name"] == "run" and first["resume"] == "allow" and len(first["id"]) == 32


def test_wandb_missing_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install 'jepax\[wandb\]'"):
    open_writer(tmp_path, wandb="project")
  with open_writer(tmp_path, tensorboard=True) as writer:  # TensorBoard only when installed
    writer.write(1, {"train/loss": 1.0})
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_shows_one_curve_after_a_resume(tmp_path):
  pytest.importorskip("tensorboard")
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  for start, value in ((0, 1.0), (2, 2.0)):
    with open_writer(tmp_path, start_step=start, tensorboard=True) as writer:
      for step in range(start + 1, 5):
        writer.write(step, {"train/loss": value})
  events = EventAccumulator(str(tmp_path / "tensorboard"))
  events.Reload()
  assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
    (1, 1.0),
    (2, 1.0),
    (3, 2.0),
    (4, 2.0),
  ]


def run_progress(console) -> str:
  clock = Clock()
  with Progress(100, start_step=10, console=console, clock=clock) as progress:
    progress.update(11)
    clock.now += 20
    values = {"train/loss": 0.12345, "time/images_per_second": 1234.4, "input/wait": 0.031}
    progress.update(21, {**values, "knn/target": 0.701, "mask/size": 9})
    progress.message("collapse: [target] rank 3")
    clock.now += 20
    progress.update(31, {"train/loss": jnp.float32(0.5)})
  return console.file.getvalue()


def test_progress_off_a_terminal_prints_plain_lines():
  output = run_progress(Console(file=io.StringIO(), width=40))
  assert output.splitlines() == [
    "step 21/100  2:38 left  loss 0.1235  k-NN 70.1%  1,234 images/s  input wait 3%",
    "collapse: [target] rank 3",
    # The k-NN keeps its latest value; 2 seconds a step, 69 steps to go.
    "step 31/100  2:18 left  loss 0.5000  k-NN 70.1%  1,234 images/s  input wait 3%",
  ]


def test_progress_on_a_terminal_is_one_line_of_its_width(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100)
  output = run_progress(console)
  assert "collapse: [target] rank 3\n" in output.replace("\r", "").replace("\x1b[2K", "")
  last = (
    output.removesuffix("\x1b[?25h")
    .rstrip("\n")
    .split("\n")[-1]
    .split("\r")[-1]
    .replace("\x1b[2K", "")
  )
  assert last.endswith(
    "31/100  2:18 left  loss 0.5000  k-NN 70.1%  1,234 images/s  input wait 3%"
  ), repr(last)
  assert "━" in last and len(last) <= 100


@pytest.mark.parametrize("terminal", [False, True])
def test_long_messages_break_between_words_and_on_a_screen_alone(monkeypatch, terminal):
  monkeypatch.setenv("TERM", "xterm")
  console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=30)
  text = "probes say that features have collapsed"
  with Progress(100, start_step=10, console=console) as progress:
    progress.message(text)
  assert ("probes say that features have \ncollapsed\n" in console.file.getvalue()) == terminal
  assert (f"{text}\n" in console.file.getvalue()) != terminal


def test_step_timer_counts_waits_and_leaves_out_pauses():
  clock = Clock()
  timer = StepTimer(32, start_step=5, clock=clock)
  for _ in range(4):
    with timer.waiting():
      clock.now += 0.5
    clock.now += 1.5
  with timer.paused():
    clock.now += 1000
  assert timer.summary(9) == {
    "time/images_per_second": 16.0,
    "time/step_seconds": 2.0,
    "input/wait": 0.25,
  }
  clock.now += 1.0
  assert timer.summary(10)["time/step_seconds"] == 1.0  # a new interval: nothing carried over
  with pytest.raises(ValueError, match="began at step 10, now 10"):
    timer.summary(10)
  clock.now += 7.0
  timer.reset(11)
  clock.now += 1.0
  assert timer.summary(12) == {
    "time/images_per_second": 32.0,
    "time/step_seconds": 1.0,
    "input/wait": 0.0,
  }


class Busy:
  """An array that the device finishes computing `seconds` from now."""

  def __init__(self, seconds):
    self.end = time.monotonic() + seconds

  def is_ready(self):
    return time.monotonic() >= self.end

  def block_until_ready(self):
    time.sleep(max(0, self.end - time.monotonic()))


@pytest.mark.parametrize(
  "computing, loading, waited", [(0, 0.4, 0.4), (0.2, 0.5, 0.3), (0.4, 0.2, 0)]
)
def test_the_device_waits_only_while_it_has_nothing_to_do(computing, loading, waited):
  timer = StepTimer(32, start_step=0)
  begin = time.perf_counter()
  with timer.waiting({"train/loss": Busy(computing)}):
    time.sleep(loading)
  seconds = time.perf_counter() - begin
  # A loaded machine wakes sleepers late: by less than a tenth of a second.
  assert timer.summary(1)["input/wait"] == pytest.approx(waited / seconds, abs=0.1 / seconds)


def test_a_slow_source_shows_as_input_wait():
  class Slow(ArraySource):
    def __getitem__(self, index):
      time.sleep(0.02)
      return super().__getitem__(index)

  def share(source, work):
    timer = StepTimer(4, start_step=0)
    options = {"batch_size": 4, "seed": 0, "start": 0, "stop": 6, "threads": 1, "prefetch": 1}
    # A transform makes the loader read by the item.
    with Loader(source, lambda image, rng: image, max_bad_fraction=0.0, **options) as loader:
      for _ in range(6):
        with timer.waiting():
          next(loader)
        time.sleep(work)
    return timer.summary(6)["input/wait"]

  images = np.zeros((24, 4, 4), np.uint8)
  assert share(Slow(images), work=0.0) > 0.9  # 80 ms a batch, and nothing to do meanwhile
  # 40 ms of work hide as much of the 80; the first batch has no work before it.
  assert 0.4 < share(Slow(images), work=0.04) < 0.8
  assert share(ArraySource(images), work=0.04) < 0.2
