"""Several processes: how they are found, that they train as one, and what happens when one goes.

The runs are those of `python -m jepax.main` under launch/local.py, with simulated devices.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import quick

from jepax import distributed
from jepax.metrics import read_history

ROOT = Path(__file__).parent.parent
STEPS = 20
CONFIG = f"""
from jepax.config import base

def get_config(arg=""):
  c = base()
  c.total, c.batch_size = "{STEPS} steps", 16
  block = dict(depth=1, heads=2, mlp_width=32)
  c.method = dict(
    name="ijepa",
    encoder=dict(variant="tiny", patch=7, width=32, **block),
    predictor=dict(width=16, **block),
    masks=dict(target_scale=(0.1, 0.25), targets=2, min_keep=2, context_keep=8),
    views=dict(),
    momentum=(0.9, 1.0),
  )
  c.data.eval_split = ""  # no probes but the collapse numbers, which compile quickly
  c.checkpoint.every = "10 steps"
  c.log.update(every="1 steps", tensorboard=False)
  c.eval.update(every="0 steps", bank=32, final_bank=32, batch_size=32)
  return c
"""


# --- who the processes are --------------------------------------------------------------------


@pytest.fixture
def joined(monkeypatch) -> list[dict]:
  """What jax.distributed.initialize was called with, in an environment of one process."""
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
  for name in (*distributed.VARIABLES.values(), "TPU_WORKER_HOSTNAMES", *SLURM):
    monkeypatch.delenv(name, raising=False)
  return calls


SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[1-2]",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "1",
  "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_a_laptop_is_one_process(joined, monkeypatch):
  assert not distributed.initialize()
  # An allocation without srun, and an srun of one task, are one process, too.
  monkeypatch.setenv("SLURM_JOB_ID", "7")
  monkeypatch.setenv("SLURM_NTASKS", "4")
  monkeypatch.setenv("SLURM_PROCID", "0")
  assert not distributed.initialize()
  for name, value in (SLURM | {"SLURM_NTASKS": "1"}).items():
    monkeypatch.setenv(name, value)
  assert not distributed.initialize()
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")  # a TPU of one host
  assert not distributed.initialize()
  assert joined == []


def test_arguments_and_variables(joined, monkeypatch):
  address = {"coordinator_address": "host:1234", "num_processes": 2}
  assert distributed.initialize(**address, process_id=1, heartbeat_timeout=9)
  for name, value in zip(distributed.VARIABLES.values(), ("host:1234", "2", "1"), strict=True):
    monkeypatch.setenv(name, value)
  assert distributed.initialize(process_id=0)
  for call, process in zip(joined, (1, 0), strict=True):
    assert call.items() >= {**address, "process_id": process}.items()
  assert joined[0]["heartbeat_timeout_seconds"] == 9
  assert joined[1]["heartbeat_timeout_seconds"] == distributed.HEARTBEAT


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"coordinator_address": "host:1"}, "found no num_processes, process_id"),
    ({"coordinator_address": "host", "num_processes": 2, "process_id": 0}, "must read host:port"),
    ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 2}, r"process_id=2 lie in 0"),
    ({"heartbeat_timeout": 0}, "at least 1 second"),
  ],
)
def test_arguments_that_can_not_be(joined, given, message):
  with pytest.raises(ValueError, match=message):
    distributed.initialize(**given)
  assert joined == []


@pytest.mark.parametrize(
  ("visible", "ids"), [("0,1,2,3", [2, 3]), ("0,1", [1]), ("3", [0]), ("", None), (None, None)]
)
def test_tasks_of_slurm_share_the_gpus_they_see(joined, monkeypatch, visible, ids):
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  if visible is not None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
  assert distributed.initialize()
  assert joined[0]["local_device_ids"] == ids and "process_id" not in joined[0]


def test_hosts_of_a_tpu_pod(joined, monkeypatch):
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t0,t1")
  assert distributed.initialize()
  assert joined[0].keys() == {"heartbeat_timeout_seconds"}


def test_one_process_agrees_with_itself():
  assert distributed.agree(0.1) == 0.1
  distributed.on_all(True, error="")
  with pytest.raises(ValueError, match=r"no disk \(process 0\)"):
    distributed.on_all(False, error="no disk")

  def refuse():
    raise ValueError("refused")

  with pytest.raises(ValueError, match="refused"):
    distributed.on_first(refuse)


# --- the launcher -----------------------------------------------------------------------------


@dataclasses.dataclass
class Done:
  code: int
  text: str
  seconds: float


def launch(*command: str, processes: int = 2, devices: int = 1, grace: float = 30) -> Done:
  """Runs launch/local.py to its end."""
  options = (f"--processes={processes}", f"--devices={devices}", f"--grace={grace}")
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, str(ROOT / "launch" / "local.py"), *options, "--", sys.executable, *command],
    cwd=ROOT,
    env=os.environ | quick.ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=1500,  # for a machine that does much else
  )
  return Done(done.returncode, done.stdout, time.monotonic() - start)


def script(text: str) -> tuple[str, str]:
  return "-c", f"import os, signal, sys, time\nme = int(os.environ['JAX_PROCESS_ID'])\n{text}"


def test_launcher_numbers_lines_and_tells_processes_of_each_other():
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_NUM_CPU_DEVICES")
  done = launch(*script(f"print(*[os.environ[n] for n in {names}])"), processes=3, devices=4)
  assert done.code == 0
  lines = sorted(done.text.splitlines())
  assert [line[:4] for line in lines] == ["[0] ", "[1] ", "[2] "]
  assert len({line[4:] for line in lines}) == 1
  assert re.fullmatch(r"localhost:\d+ 3 4", lines[0][4:])


@pytest.mark.parametrize(
  ("end", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", 137)]
)
def test_launcher_ends_all_when_one_fails(end, code):
  done = launch(*script(f"if me == 1:\n  {end}\ntime.sleep(100)"), grace=0.5)
  assert done.code == code and done.seconds < 60
  assert "process 1 of 2" in done.text and "still running, and killed: 0" in done.text


def test_launcher_passes_signals_on():
  """SIGTERM and SIGINT arrive as SIGTERM; all processes answer it in their own way."""
  body = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nprint('up')\ntime.sleep(100)"
  command = [sys.executable, str(ROOT / "launch" / "local.py"), "--", sys.executable]
  with subprocess.Popen([*command, *script(body)], stdout=subprocess.PIPE, text=True) as process:
    assert {process.stdout.readline(), process.stdout.readline()} == {"[0] up\n", "[1] up\n"}
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0


# --- training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("runs")
  (path / "config.py").write_text(CONFIG)
  return path


def train(folder: Path, run: str, *, processes: int, devices: int, signal_at: str = "") -> Done:
  """A run, or its continuation; signal_at: 'PROCESS STEP SIGNAL', see run_main.py."""
  program = [str(ROOT / "tests" / "run_main.py"), *signal_at.split()]
  command = program if signal_at else ["-m", "jepax.main"]
  flags = (f"--config={folder / 'config.py'}", f"--workdir={folder / run}")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    return launch(*command, *flags, processes=processes, devices=devices)


def losses(folder: Path, run: str) -> np.ndarray:
  rows = [row for row in read_history(folder / run) if "train/loss" in row]
  assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))  # none twice
  return np.array([row["train/loss"] for row in rows])


@pytest.fixture(scope="module")
def reference(folder) -> np.ndarray:
  """The losses of one process with one device."""
  done = train(folder, "1x1", processes=1, devices=1)
  assert done.code == 0, done.text
  found = losses(folder, "1x1")
  assert len(found) == STEPS and found[-1] < 0.95 * found[0]  # it trains: equality says something
  return found


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
  """Equal but for float32 sums in another order: ten times the 2e-7 that was measured."""
  np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (2, 4)])
def test_processes_and_devices_do_not_change_the_losses(folder, reference, processes, devices):
  run = f"{processes}x{devices}"
  done = train(folder, run, processes=processes, devices=devices)
  assert done.code == 0, done.text
  assert_same(losses(folder, run), reference)
  assert {"results.json", "report.html", "config.json"} <= set(os.listdir(folder / run))
  assert "[1] step" not in done.text and "[1] report" not in done.text  # process 0 alone reports


def test_a_signal_a_loss_and_other_numbers_of_processes(folder, reference):
  """Stopped on 2 processes, gone on with on 4, of which one is killed, and ended on 1."""
  done = train(folder, "moved", processes=2, devices=4, signal_at="1 4 SIGTERM")
  assert done.code == 0, done.text
  stopped = int(re.search(r"stopped by a signal and saved at step (\d+)", done.text).group(1))
  assert 4 <= stopped < 14 and len(losses(folder, "moved")) == stopped

  done = train(folder, "moved", processes=4, devices=2, signal_at="2 14 SIGKILL")
  assert f"going on from step {stopped} of {STEPS}" in done.text
  last = max(10, stopped)
  assert done.code != 0 and done.seconds < 300  # the time to start and compile included
  for process in (0, 1, 3):
    assert re.search(
      rf"\[{process}\] error: process 2 of 4 was lost.*it resumes from step {last}", done.text
    ), done.text
  assert "stack trace" not in done.text and "Traceback" not in done.text

  done = train(folder, "moved", processes=1, devices=1)
  assert done.code == 0, done.text
  assert f"going on from step {last} of {STEPS}" in done.text
  assert_same(losses(folder, "moved"), reference)


def test_a_workdir_in_use_is_refused_by_all_processes(folder, reference):
  import fcntl

  with open(folder / "1x1" / ".lock", "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    done = train(folder, "1x1", processes=2, devices=1)
  assert done.code == 2
  assert "[0] error: another process trains in" in done.text
  assert "[1] error: process 0 can't start" in done.text
