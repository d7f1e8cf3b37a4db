"""How long after its start a run has made its first step, with and without a cache of programs.

  python benchmarks/first_step.py [--device=cuda] [CONFIG[,KEY=VALUE ...] ...]

Starts each case twice, in a process of its own: with an empty folder for JAX's compiled programs,
and again with what the first start left there, as a run on a GPU or TPU does that is started again
(`jepax.main.keep_programs`). Images are random; reading data is not part of it. Writes
benchmarks/results/first_step.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import step_time

HERE = pathlib.Path(__file__).parent
CASES = {
  # Two CPU devices that take programs from a cache have been seen to wait for each other for ever.
  "cpu": (
    "configs/quickstart.py,mesh.cpu_devices=1",
    "configs/ijepa_vits.py,batch_size=16,precision=float32,mesh.cpu_devices=1",
  ),
  "cuda": step_time.CASES["cuda"],
}
PARTS = ("import", "trace", "first state", "first step", "in all")


def run(spec: str, *, start: float) -> dict:
  """Seconds of each part of a start, from the process's own on."""
  import jax
  import numpy as np

  marks = [start, time.time()]
  experiment = step_time.load(spec)
  marks.append(time.time())
  c = experiment.config
  shape = (c.batch_size, c.data.size, c.data.size, c.data.channels)
  images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
  state = jax.block_until_ready(experiment.initial_state())
  marks.append(time.time())
  batch = {"image": jax.device_put(images, experiment.batch_sharding)}
  _, metrics = experiment.train_step(state, batch)
  loss = float(metrics["train/loss"])
  marks.append(time.time())
  if not np.isfinite(loss):
    raise SystemExit(f"{spec}: the first loss is {loss}")
  parts = [after - before for before, after in itertools.pairwise(marks)]
  seconds = dict(zip(PARTS, [*parts, marks[-1] - start], strict=True))
  return {"seconds": seconds, "device": jax.devices()[0].device_kind, "loss": loss}


def measure(spec: str, environment: dict[str, str]) -> list[dict]:
  """The first start and the second."""
  found = []
  with tempfile.TemporaryDirectory() as programs:
    cached = environment | {
      "JAX_COMPILATION_CACHE_DIR": programs,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",  # JAX's own default
    }
    for _ in range(2):
      command = [sys.executable, __file__, f"--worker={spec}", f"--start={time.time()}"]
      done = subprocess.run(command, env=cached, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
      if done.returncode:
        raise SystemExit(f"failed: {spec}")
      found.append(json.loads(done.stdout.splitlines()[-1]))
  return found


def table(results: list[dict]) -> str:
  """Markdown, a row a start; the ratio first."""
  lines = [
    f"| second to first | case | start | device | {' | '.join(f'{part}, s' for part in PARTS)} |",
    "|---" * (4 + len(PARTS)) + "|",
  ]
  for result in results:
    first, second = result["starts"]
    ratio = second["seconds"]["in all"] / first["seconds"]["in all"]
    for name, start in (("first", first), ("second", second)):
      cells = [f"{start['seconds'][part]:.1f}" for part in PARTS]
      lead = [f"{ratio:.2f}" if name == "second" else "", result["case"], name, start["device"]]
      lines.append(f"| {' | '.join([*lead, *cells])} |")
  return "\n".join(lines)


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("cases", nargs="*", help="CONFIG[,KEY=VALUE ...]; those of the device")
  parser.add_argument("--device", choices=list(CASES), default=step_time.device())
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  parser.add_argument("--start", type=float, help=argparse.SUPPRESS)
  return parser.parse_args()


def main() -> None:
  options = parse()
  if options.worker:
    print(json.dumps(run(options.worker, start=options.start)))
    return
  step_time.check_device(options.device)
  environment = step_time.ENVIRONMENTS[options.device] | dict(os.environ)
  os.environ["JAX_PLATFORMS"] = "cpu"  # this process computes nothing
  from jepax.versions import environment as versions

  results = []
  for spec in options.cases or CASES[options.device]:
    results.append({"case": spec, "starts": measure(spec, environment)})
    print(table(results[-1:]), flush=True)
  command = " ".join(["python benchmarks/first_step.py", *sys.argv[1:]])
  notes = {"date": datetime.date.today().isoformat(), "command": command, **versions()}
  notes |= {"devices": results[0]["starts"][0]["device"]}
  name = "first_step" if options.device == "cpu" else f"first_step_{options.device}"
  title = "From the start of a process to its first step"
  step_time.write(name, title, table(results), results, notes)


if __name__ == "__main__":
  main()
