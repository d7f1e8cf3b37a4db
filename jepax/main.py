"""python -m jepax.main --config=FILE[:ARG] [--workdir=DIR] [--config.KEY=VALUE ...]"""

from __future__ import annotations

import functools
import shlex
import sys
from pathlib import Path

import jax
from absl import app, flags, logging

from jepax import cli, distributed, huge_pages
from jepax import config as config_lib

CONFIG = flags.DEFINE_string(
  "config",
  None,
  "Config file, with an argument after a colon: configs/quickstart.py:smoke",
  required=True,
)
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run lies; runs/NAME of the config by default. Resumes what is there."
)
DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Check all, take two steps, print the plan of time and memory, write nothing."
)
COORDINATOR = flags.DEFINE_string(
  "coordinator_address", None, "Of several processes: host:port of the first. See docs/scaling.md."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
HEARTBEAT = flags.DEFINE_integer(
  "heartbeat_timeout",
  distributed.HEARTBEAT,
  "Seconds after which a silent process counts as lost, and the others end.",
)


def main(argv: list[str]) -> None:
  """Joins the other processes, if any, loads the config, then trains, resumes or refuses."""
  command = shlex.join(["python", "-m", "jepax.main", *sys.argv[1:]])
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  with cli.errors(ValueError):
    several = distributed.initialize(
      coordinator_address=COORDINATOR.value,
      num_processes=NUM_PROCESSES.value,
      process_id=PROCESS_ID.value,
      heartbeat_timeout=HEARTBEAT.value,
    )
  with distributed.leaving_at_once():
    train(argv[1:], command, several=several)


def train(overrides: list[str], command: str, *, several: bool) -> None:
  """Trains; process 0 alone reports."""
  # What builds models loads here, after the flags were found good.
  from jepax import fit, preflight, sharding

  try:
    with cli.errors(fit.Failed, status=1), cli.errors(ValueError, OSError, fit.Diverged):
      config = config_lib.load(CONFIG.value, [a.removeprefix("config.") for a in overrides])
      rows = config.batch_size // max(1, config.accumulate)
      if not several or config.mesh.cpu_devices:
        sharding.use_all_cores(rows=rows, count=config.mesh.cpu_devices)
      workdir = Path(WORKDIR.value or default_workdir(CONFIG.value))
      if DRY_RUN.value:
        return preflight.show(preflight.run(config, workdir))
      keep_programs(workdir)
      results = fit.run(config, workdir, command=command)
  except KeyboardInterrupt:  # in training a signal saves first; this is before or after it
    print(f"interrupted; to go on:\n  {command}", file=sys.stderr)
    sys.exit(130)
  if jax.process_index() != 0:
    return
  if results["train"]["status"] == "preempted":
    step = results["train"]["steps"]
    print(f"stopped by a signal and saved at step {step}; to go on:\n  {command}")
    return
  print_results(results, workdir)


def keep_programs(workdir: Path) -> None:
  """Has a restart find its compiled programs in the workdir, unless JAX was told of another place.

  Not those for a CPU: they hold for one kind of CPU, and workdirs move.
  """
  if jax.default_backend() != "cpu" and jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(workdir / "programs"))


def default_workdir(spec: str) -> str:
  """'configs/quickstart.py:smoke' -> 'runs/quickstart-smoke'."""
  name, _, arg = spec.partition(":")
  return f"runs/{Path(name).stem}{'-' * bool(arg)}{arg.replace(',', '-').replace('=', '')}"


def print_results(results: dict, workdir: Path) -> None:
  """The table of accuracies, the alarms, and where the report lies."""
  print()
  for probe in ("knn", "linear"):
    if probe in results:
      for name, accuracy in results[probe].items():
        print(f"{probe:8}{name:14}{accuracy:7.1%}")
  for alarm in results["alarms"]:
    print(f"ALARM: {alarm}")
  print(f"\nreport: {workdir / 'report.html'}")


if __name__ == "__main__":
  huge_pages.restart_with()
  app.run(main, flags_parser=functools.partial(cli.parse, prefix="--config."))
