"""What the choices in the training step are worth: as configured, and with one of them undone.

  python benchmarks/choices.py [--rounds=3 --steps=10]

Rows take turns, each in a process of its own, as in benchmarks/step_time.py; the ratio is the time
of a row by that of the first. Writes benchmarks/results/choices.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys

from jepax import huge_pages

HERE = pathlib.Path(__file__).parent
BOTH = ("method.encoder", "method.predictor")


def of_both(setting: str) -> str:
  """The same override of encoder and predictor."""
  return ",".join(f"{part}.{setting}" for part in BOTH)


# Choices that are no overrides: see jepax.huge_pages and jepax.compiler.
SMALL_PAGES = "GLIBC_TUNABLES="
EIGEN = "XLA_FLAGS=--xla_cpu_use_onednn=false"

CASES = {
  "configs/quickstart.py": {
    "as configured (unrolled, one device a core, tanh GELU)": "",
    "one device, whose threads share each operation": "mesh.cpu_devices=1",
    "memory on small pages": SMALL_PAGES,
    "matrix products by Eigen": EIGEN,
    "exact GELU": of_both("activation=gelu"),
    "attention: jax.nn.dot_product_attention": of_both("attention=xla"),
    "blocks scanned": of_both("scan=true"),
    "all but matrix products computed again": of_both("remat=dots"),
  },
  "configs/ijepa_vits.py,batch_size=16,precision=float32": {
    "as configured (unrolled, one device a core, tanh GELU)": "",
    "one device, whose threads share each operation": "mesh.cpu_devices=1",
    "one device a core, each with its share of the parameters": "mesh.data=1,mesh.fsdp=-1",
    "memory on small pages": SMALL_PAGES,
    "matrix products by Eigen": EIGEN,
    "attention: jax.nn.dot_product_attention": of_both("attention=xla"),
    "blocks scanned": of_both("scan=true"),
    "scanned, all but matrix products again": f"{of_both('scan=true')},{of_both('remat=dots')}",
  },
}

SHORT = {"configs/quickstart.py": 20}  # times as many steps, each a small part of a second


def measure(base: str, setting: str, options: argparse.Namespace) -> dict:
  """One process's times, see `step_time.run_jepax`."""
  added = huge_pages.environment()  # as jepax.main has it
  name, _, value = setting.partition("=")
  if name.isupper():  # a variable of the environment
    added, setting = added | {name: value}, ""
  spec = f"{base},{setting}".rstrip(",")
  command = [sys.executable, str(HERE / "step_time.py"), f"--worker={spec}"]
  times = SHORT.get(base, 1)
  command += [f"--steps={times * options.steps}", f"--warmup={times * 2}"]
  done = subprocess.run(
    command,
    env=os.environ | added,
    stdin=subprocess.DEVNULL,  # no turns to wait for
    stdout=subprocess.PIPE,
    text=True,
    cwd=HERE.parent,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def compare(base: str, choices: dict[str, str], options: argparse.Namespace) -> list[dict]:
  """One row a choice; the rows take turns."""
  found = {name: [] for name in choices}
  for _ in range(options.rounds):
    for name, setting in choices.items():
      found[name].append(measure(base, setting, options))
  rows, first = [], None
  for name, runs in found.items():
    seconds = statistics.median(statistics.median(run["seconds"]) for run in runs)
    first = seconds if first is None else first
    rows.append(
      {
        "choice": name,
        "ratio": round(seconds / first, 2),
        "milliseconds": round(1000 * seconds, 1),
        "first step, s": round(statistics.median(run["first_step"] for run in runs), 1),
        "peak, GiB": round(max(run["peak_bytes"] for run in runs) / 2**30, 2),
      }
    )
  return rows


def table(rows: list[dict]) -> str:
  """Markdown."""
  lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
  return "\n".join(lines + [f"| {' | '.join(map(str, row.values()))} |" for row in rows])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=10)
  options = parser.parse_args()
  load = round(os.getloadavg()[0], 1)
  found = {base: compare(base, choices, options) for base, choices in CASES.items()}
  from jepax.versions import environment

  notes = {
    "device": f"{len(os.sched_getaffinity(0))} CPU cores",
    "load at start": load,
    "date": datetime.date.today().isoformat(),
    "command": " ".join(["python", "benchmarks/choices.py", *sys.argv[1:]]),
    **environment(),
  }
  path = HERE / "results" / "choices.json"
  path.write_text(json.dumps({"notes": notes, "results": found}, indent=1) + "\n")
  parts = ["# What the choices in the training step are worth"]
  parts += [f"## {base}\n\n{table(rows)}" for base, rows in found.items()]
  parts.append("\n".join(f"- {name}: {value}" for name, value in notes.items()))
  path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
  print("\n\n".join(parts[1:-1]))


if __name__ == "__main__":
  main()
