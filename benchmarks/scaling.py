"""The training step on more devices: of the same batch (strong), of the same rows each (weak).

  python benchmarks/scaling.py [--devices=1,2,4,8] [--rounds=3 --steps=20] [CONFIG[,KEY=VALUE]]

On a CPU a device is a core, and the run gets that many cores and no more; on GPUs, CUDA's first
ones. On a CPU the most devices are timed once more as that many processes. Rows take turns, each in
a process of its own, on random images that lie on the devices already. Efficiency: of a device,
against a device alone. Writes benchmarks/results/scaling.json and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys

import step_time

from jepax import huge_pages

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent


@dataclasses.dataclass
class Row:
  """One setting. rate: images a second, one a round."""

  kind: str
  devices: int
  processes: int
  batch: int
  rate: list[float] = dataclasses.field(default_factory=list)


def rows(counts: list[int], *, batch: int, cpu: bool) -> list[Row]:
  """What is timed; `batch` is that of one device alone and of all in the strong rows."""
  found = [Row("strong", n, 1, batch) for n in counts]
  found += [Row("weak", n, 1, batch * n) for n in counts[1:]]
  if cpu and counts[-1] > 1:
    found.append(Row("strong", counts[-1], counts[-1], batch))
  return found


def measure(row: Row, spec: str, options: argparse.Namespace, *, cpu: bool) -> None:
  """Times a row once."""
  environment = os.environ | huge_pages.environment()
  command = [sys.executable, str(HERE / "scaling.py"), f"--worker={spec},batch_size={row.batch}"]
  command.append(f"--steps={options.steps}")
  if row.processes > 1:
    launcher = [sys.executable, str(ROOT / "launch" / "local.py")]
    command = [*launcher, f"--processes={row.processes}", "--devices=1", "--", *command]
  elif cpu:
    environment["JAX_NUM_CPU_DEVICES"] = str(row.devices)
  else:
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(row.devices)))
  cores = sorted(os.sched_getaffinity(0))
  try:
    if cpu:
      os.sched_setaffinity(0, cores[: row.devices])  # the child inherits it
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
  finally:
    os.sched_setaffinity(0, cores)
  if done.returncode:
    raise SystemExit(f"failed: {' '.join(command)}")
  last = next(line for line in reversed(done.stdout.splitlines()) if '"seconds"' in line)
  found = json.loads(last[last.index("{") :])
  row.rate.append(row.batch / statistics.median(found["seconds"]))


def worker(spec: str, steps: int) -> None:
  """Prints the seconds of each step as JSON; of several processes, the first."""
  import jax

  from jepax import distributed

  distributed.initialize()
  found = step_time.run_jepax(spec, warmup=3, steps=steps)
  if jax.process_index() == 0:
    print(json.dumps(found), flush=True)


def table(found: list[Row]) -> str:
  """Markdown, medians over rounds."""
  alone = statistics.median(found[0].rate)
  heads = (
    "kind",
    "devices",
    "processes",
    "batch",
    "images a second",
    "speed-up",
    "efficiency",
  )
  lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
  for row in found:
    rate = statistics.median(row.rate)
    gain = rate / alone
    cells = (row.kind, row.devices, row.processes, row.batch, f"{rate:.1f}", f"{gain:.2f}")
    lines.append(f"| {' | '.join(map(str, cells))} | {gain / row.devices:.0%} |")
  return "\n".join(lines)


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("spec", nargs="?", default="configs/quickstart.py", help="CONFIG[,KEY=VALUE]")
  parser.add_argument("--devices", help="counts by commas, from 1; by default powers of 2 to all")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  return parser.parse_args()


def main() -> None:
  options = parse()
  if options.worker:
    worker(options.worker, options.steps)
    return
  probe = "import jax; print(jax.devices()[0].platform, len(jax.devices()))"
  found = subprocess.run(
    [sys.executable, "-c", probe], stdout=subprocess.PIPE, text=True, check=True
  )
  platform, count = found.stdout.split()
  cpu = platform == "cpu"
  most = len(os.sched_getaffinity(0)) if cpu else int(count)
  powers = ",".join(str(2**i) for i in range(most.bit_length()))
  counts = [int(n) for n in (options.devices or powers).split(",")]
  if counts[0] != 1 or max(counts) > most:
    raise SystemExit(f"--devices must begin with 1 and stay within the {most} of this machine")
  os.environ["JAX_PLATFORMS"] = platform
  from jepax import config as config_lib
  from jepax.versions import environment as versions

  path, *overrides = options.spec.split(",")
  batch = config_lib.load(str(ROOT / path), overrides).batch_size
  timed = rows(counts, batch=batch, cpu=cpu)
  for _ in range(options.rounds):
    for row in timed:
      measure(row, options.spec, options, cpu=cpu)
  notes = {
    "config": options.spec,
    "device": f"{most} CPU cores" if cpu else f"{most} GPUs",
    "load at start": round(os.getloadavg()[0], 1),
    "date": datetime.date.today().isoformat(),
    "command": " ".join(["python", "benchmarks/scaling.py", *sys.argv[1:]]),
    **versions(),
  }
  text = ["# A training step on more devices", table(timed)]
  text.append("\n".join(f"- {name}: {value}" for name, value in notes.items()))
  path = HERE / "results" / "scaling.json"
  path.write_text(json.dumps({"notes": notes, "rows": list(map(dataclasses.asdict, timed))}) + "\n")
  path.with_suffix(".md").write_text("\n\n".join(text) + "\n")
  print(text[1])


if __name__ == "__main__":
  main()
